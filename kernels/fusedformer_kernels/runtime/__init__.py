"""How kernels are launched, with which config, on which strides."""
