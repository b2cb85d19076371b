"""GPU kernels in Triton and the layouts that they read; torch and triton only."""
