"""The benchmark of decoding: what each way of backpropagating through a video decoder costs, and how wrong it is."""
