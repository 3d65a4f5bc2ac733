"""What all tests share."""
import torch

torch.set_num_threads(1)  # of models this small, threads only make the sums come out in another order
