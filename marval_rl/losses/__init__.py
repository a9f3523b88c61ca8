"""The losses: pure functions of tensors, with no trainer and no model in sight."""
