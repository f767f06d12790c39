"""What a training run needs before it is started: memory, FLOPs, seconds and GPU-hours.

Arithmetic on shapes: no GPU, no download. PyTorch is imported only to count the parameters of a
checkpoint that is neither Qwen2 nor Qwen2.5-VL.
"""
