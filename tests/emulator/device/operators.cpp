// Torch's operators for the fake device: each runs the host's kernel on host tensors at the same
// addresses. What mixes devices raises, as it does on a GPU.

#include "device.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Resize.h>
#include <torch/library.h>

#include <map>
#include <set>
#include <string>

namespace fake {
namespace {

using at::Tensor;
using Stack = torch::jit::Stack;

// These take tensors of the host beside the device's.
const std::set<std::string> kMixing = {"aten::copy_",
                                       "aten::_copy_from",
                                       "aten::_copy_from_and_resize",
                                       "aten::_to_copy",
                                       "aten::index",
                                       "aten::index_put",
                                       "aten::index_put_",
                                       "aten::_index_put_impl_",
                                       "aten::_unsafe_index",
                                       "aten::is_set_to",
                                       "aten::_has_compatible_shallow_copy_type"};
// The host waits for their values.
const std::set<std::string> kWaiting = {"aten::_local_scalar_dense",
                                        "aten::nonzero",
                                        "aten::masked_select",
                                        "aten::equal",
                                        "aten::_unique",
                                        "aten::_unique2",
                                        "aten::unique_consecutive",
                                        "aten::unique_dim"};

// A tensor of the host at the same address.
Tensor on_host(const Tensor& tensor) {
  const auto& storage = tensor.storage();
  c10::DataPtr pointer(storage.mutable_data(), c10::Device(c10::DeviceType::CPU));
  c10::Storage same(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(pointer), nullptr,
                    false);
  auto alias = at::detail::make_tensor<c10::TensorImpl>(
      std::move(same), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  auto* impl = alias.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return alias;
}

Tensor new_tensor(at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype) {
  const c10::DispatchKeySet key(c10::DispatchKey::CUDA);
  return Tensor(at::detail::empty_strided_generic(size, stride, allocator(), key, dtype));
}

Tensor copied_to_device(const Tensor& host) {
  const bool is_dense = host.is_non_overlapping_and_dense();
  auto copy = new_tensor(host.sizes(), is_dense ? host.strides() : host.contiguous().strides(),
                         host.scalar_type());
  on_host(copy).copy_(host);
  return copy;
}

// Applies a function to every tensor of a value, in lists too.
template <typename Function>
c10::IValue mapped(const c10::IValue& value, Function function) {
  if (value.isTensor()) return function(value.toTensor());
  if (value.isTensorList()) {
    auto list = value.toTensorVector();
    for (auto& one : list) one = function(one);
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const auto& one : value.toOptionalTensorVector())
      list.push_back(one.has_value() ? std::optional<Tensor>(function(*one)) : std::nullopt);
    return list;
  }
  return value;
}

// One call of an operator, by the host's kernel.
class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack) : op_(op), stack_(stack) {
    const auto& schema = op.schema();
    name_ = schema.name();
    full_name_ = schema.overload_name().empty() ? name_ : name_ + "." + schema.overload_name();
    arguments_ = schema.arguments().size();
    results_ = schema.returns().size();
    draws_ = op.hasTag(at::Tag::nondeterministic_seeded);
  }

  void run() {
    check_devices();
    if (kWaiting.count(name_)) forbid_in_capture(full_name_);
    const auto begin = stack_->size() - arguments_;
    for (size_t i = 0; i < arguments_; i++)
      translate((*stack_)[begin + i], op_.schema().arguments()[i]);
    Stack again;
    if (is_capturing()) again.assign(stack_->end() - arguments_, stack_->end());
    execute(stack_);
    for (const auto& [device, host] : written_) resize_as(device, host);
    for (size_t i = stack_->size() - results_; i < stack_->size(); i++)
      (*stack_)[i] = mapped((*stack_)[i], [&](const Tensor& host) { return returned(host); });
    if (is_capturing()) record_again(std::move(again));
  }

 private:
  void check_devices() {
    bool has_cuda = false, has_generator_of_host = false;
    const char* other = nullptr;
    const auto look = [&](const Tensor& tensor) {
      if (!tensor.defined()) return tensor;
      if (tensor.is_cuda())
        has_cuda = true;
      else if (tensor.dim() > 0 || !tensor.is_cpu())
        other = tensor.is_cpu() ? "cpu" : "meta";
      return tensor;
    };
    bool has_host = false;
    for (const auto& value : torch::jit::last(stack_, arguments_)) {
      mapped(value, look);
      if (value.isDevice() && value.toDevice().is_cuda()) has_cuda = true;
      if (value.isGenerator() && value.toGenerator().defined())
        has_generator_of_host |= value.toGenerator().device().is_cpu();
      if (value.isTensor() && value.toTensor().defined() && value.toTensor().is_cpu())
        has_host = true;
    }
    TORCH_CHECK(!has_cuda || other == nullptr || kMixing.count(name_),
                "Expected all tensors to be on the same device, but found at least two devices, "
                "cuda:0 and ",
                other, "! (", full_name_, ")");
    TORCH_CHECK(!has_cuda || !has_generator_of_host,
                "Expected a 'cuda' device type for generator but found 'cpu' (", full_name_, ")");
    // Memory that the host may change meanwhile cannot be part of a graph.
    if (has_host && (name_ == "aten::copy_" || name_ == "aten::_copy_from"))
      forbid_in_capture(full_name_ + " with the host");
  }

  void translate(c10::IValue& value, const c10::Argument& argument) {
    const bool is_written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    if (value.isDevice() && value.toDevice().is_cuda()) {
      value = c10::Device(c10::DeviceType::CPU);
    } else if (value.isGenerator()) {
      if (value.toGenerator().defined()) value = host_generator(value.toGenerator());
    } else {
      value = mapped(value, [&](const Tensor& tensor) { return given(tensor, is_written); });
    }
  }

  Tensor given(const Tensor& device, bool is_written) {
    if (!device.defined() || !device.is_cuda()) return device;
    const auto known = given_.find(device.unsafeGetTensorImpl());
    if (known != given_.end()) return known->second;
    // A result that the kernel may resize must own its memory.
    Tensor host = is_written && device.numel() == 0
                      ? at::empty(device.sizes(), device.options().device(at::kCPU))
                      : on_host(device);
    given_[device.unsafeGetTensorImpl()] = host;
    origin_[host.unsafeGetTensorImpl()] = device;
    if (device.numel() > 0) by_memory_[host.storage().data()] = device;
    if (is_written) written_.emplace_back(device, host);
    alive_.push_back(device);
    return host;
  }

  void execute(Stack* stack) const {
    std::optional<HostDrawsAsDevice> draws;
    if (draws_) draws.emplace();
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }

  static void resize_as(const Tensor& device, const Tensor& host) {
    if (device.sizes() == host.sizes() && (device.numel() > 0 || host.numel() == 0)) return;
    device.resize_(host.sizes());
    if (host.numel() > 0) on_host(device).copy_(host);
  }

  // What the device returns for what the host's kernel does: an argument, a view of one, or a copy.
  Tensor returned(const Tensor& host) {
    if (!host.defined() || !host.is_cpu()) return host;
    const auto known = origin_.find(host.unsafeGetTensorImpl());
    if (known != origin_.end()) return known->second;
    const auto of = host.has_storage() ? by_memory_.find(host.storage().data()) : by_memory_.end();
    if (of == by_memory_.end()) {
      auto copy = copied_to_device(host);
      new_.emplace_back(copy);
      return copy;
    }
    auto view = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(of->second.storage()), c10::DispatchKeySet(c10::DispatchKey::CUDA),
        host.dtype());
    view.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(),
                                                      host.storage_offset());
    new_.emplace_back();
    return view;
  }

  void record_again(Stack arguments) const {
    record([call = *this, arguments] {
      Stack stack = arguments;
      call.execute(&stack);
      for (const auto& [device, host] : call.written_) {  // what the kernel resized is its own
        const Tensor same = on_host(device);
        if (host.numel() > 0 && same.data_ptr() != host.data_ptr()) same.copy_(host);
      }
      size_t next = 0;
      for (const auto& value : torch::jit::last(stack, call.results_))
        mapped(value, [&](const Tensor& host) {
          if (!host.defined() || !host.is_cpu() || call.origin_.count(host.unsafeGetTensorImpl()))
            return host;
          const Tensor& device = call.new_.at(next++);
          if (device.defined()) on_host(device).copy_(host);
          return host;
        });
    });
  }

  c10::OperatorHandle op_;
  Stack* stack_;
  std::string name_, full_name_;
  size_t arguments_ = 0, results_ = 0;
  bool draws_ = false;
  std::map<c10::TensorImpl*, Tensor> given_, origin_;
  std::map<const void*, Tensor> by_memory_;
  std::vector<std::pair<Tensor, Tensor>> written_;  // device, host
  std::vector<Tensor> new_;  // results in order; undefined where a view needs no copy
  std::vector<Tensor> alive_;
};

void run_on_host(const c10::OperatorHandle& op, Stack* stack) { Call(op, stack).run(); }

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool> is_pinned,
             std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!is_pinned.value_or(false), "Only dense CPU tensors can be pinned");
  const c10::DispatchKeySet key(c10::DispatchKey::CUDA);
  return Tensor(at::detail::empty_generic(
      size, allocator(), key, dtype.value_or(at::get_default_dtype_as_scalartype()), format));
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  return new_tensor(size, stride, dtype.value_or(at::get_default_dtype_as_scalartype()));
}

const Tensor& resize(const Tensor& self, c10::IntArrayRef size,
                     std::optional<at::MemoryFormat> format) {
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), size, std::nullopt, true);
  if (format.has_value()) self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return self;
}

Tensor& set_at(Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef size,
               c10::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize());
  return set_at(self, std::move(storage), 0, {count}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_at(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& set_nothing(Tensor& self) {
  c10::Storage none(c10::Storage::use_byte_size_t(), 0, allocator()->allocate(0), allocator(),
                    true);
  return set_at(self, std::move(none), 0, {0}, {1});
}

void record_stream(Tensor&, c10::Stream) {}

Tensor mm_wider(const Tensor& left, const Tensor& right, at::ScalarType dtype) {
  return left.to(dtype).mm(right.to(dtype));
}

Tensor& mm_wider_out(const Tensor& left, const Tensor& right, at::ScalarType dtype, Tensor& out) {
  return out.copy_(mm_wider(left, right, dtype));
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("resize_", resize);
  library.impl("set_.source_Storage_storage_offset", set_at);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_", set_nothing);
  library.impl("record_stream", record_stream);
}

// A product wider than its operands is an operator of CUDA alone: the host gets one too.
TORCH_LIBRARY_IMPL(aten, CPU, library) {
  library.impl("mm.dtype", mm_wider);
  library.impl("mm.dtype_out", mm_wider_out);
}

// Operators that have a kernel for every device beside those of CPU and CUDA: the fallback alone
// would leave them to the former, which a GPU does not run. copy_ has the host's part within.
void prefer_kernels_of_the_host() {
  auto& dispatcher = c10::Dispatcher::singleton();
  static auto* alive = new std::vector<c10::RegistrationHandleRAII>;
  for (const auto& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    if (!op.has_value() || op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) continue;
    const bool is_composite =
        op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd) ||
        op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutogradNonFunctional);
    const bool is_wanted = op->hasKernelForDispatchKey(c10::DispatchKey::CPU) && is_composite;
    if (!is_wanted && !(name.name == "aten::copy_")) continue;
    alive->push_back(dispatcher.registerImpl(
        name, c10::DispatchKey::CUDA, c10::KernelFunction::makeFromBoxedFunction<&run_on_host>(),
        std::nullopt, nullptr, "the fake device"));
  }
}

const bool is_registered = [] {
  c10::SetAllocator(c10::DeviceType::CUDA, allocator());
  prefer_kernels_of_the_host();
  return true;
}();

}  // namespace
}  // namespace fake
