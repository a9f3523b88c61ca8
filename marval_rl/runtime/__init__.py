"""What a training run is made of, whatever the algorithm: arguments, batches, checkpoints, averages, processes."""
