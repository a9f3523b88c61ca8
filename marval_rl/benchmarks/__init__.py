"""What `marval-rl bench` measures: ratios of times taken in turn, in one process."""
