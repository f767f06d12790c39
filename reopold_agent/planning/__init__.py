"""What a training run needs before it is started: memory, FLOPs, seconds and GPU-hours.

Plain arithmetic on shapes: no PyTorch, no GPU, no download.
"""
