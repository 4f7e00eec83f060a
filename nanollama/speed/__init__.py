"""What makes a token cheaper: compiled and CUDA-graph steps, integer weights, large pages."""
