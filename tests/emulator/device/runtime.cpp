// What torch asks of a CUDA runtime: one device, streams that are all alike, and generators.
//
// Whatever is enqueued has run when the call returns, so streams and events have nothing to do.

#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace fake {
namespace {

thread_local int64_t current_stream = 0;
int64_t last_stream = 0;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, cuda(), id); }
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return cuda(); }
  c10::Device getDevice() const override { return cuda(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override {
    return stream(++last_stream);
  }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(++last_stream); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    const auto before = stream(current_stream);
    current_stream = next.id();
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { forbid_in_capture("synchronize"); }
  void synchronizeEvent(void*) const override { forbid_in_capture("synchronize"); }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    forbid_in_capture("synchronize");
  }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 0.0; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// Draws the host's numbers; its own class, so that a generator of the wrong device is told apart.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(uint64_t seed)
      : GeneratorImpl(cuda(), c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        host(at::detail::createCPUGenerator(seed)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.get_offset(); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override {
    auto* copy = new Generator(0);
    copy->host.set_state(host.get_state());
    return copy;
  }
  mutable at::Generator host;
};

const at::Generator& default_generator() {
  static at::Generator one = at::make_generator<Generator>(c10::default_rng_seed_val);
  return one;
}

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::Device getDeviceFromPtr(void*) const override { return cuda(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return default_generator();
  }
  // Python has no other way to the default one: it is the first that is asked for.
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    static bool is_first = true;
    if (!is_first) return at::make_generator<Generator>(c10::default_rng_seed_val);
    is_first = false;
    return default_generator();
  }
};

}  // namespace

at::Generator host_generator(const std::optional<at::Generator>& generator) {
  const auto& given =
      generator.has_value() && generator->defined() ? *generator : default_generator();
  return static_cast<Generator*>(given.unsafeGetGeneratorImpl())->host;
}

HostDrawsAsDevice::HostDrawsAsDevice() {
  auto host = at::detail::getDefaultCPUGenerator();
  before_ = host.get_state();
  host.set_state(host_generator(std::nullopt).get_state());
}

HostDrawsAsDevice::~HostDrawsAsDevice() {
  auto host = at::detail::getDefaultCPUGenerator();
  auto device = host_generator(std::nullopt);
  device.set_state(host.get_state());
  host.set_state(before_);
}

}  // namespace fake

namespace at {
using FakeCudaHooks = fake::Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, FakeCudaHooks)
}  // namespace at

extern "C" {
int64_t device_stream() { return fake::current_stream; }
int64_t device_new_stream() { return ++fake::last_stream; }
int64_t device_set_stream(int64_t id) {
  const int64_t before = fake::current_stream;
  fake::current_stream = id;
  return before;
}
}
