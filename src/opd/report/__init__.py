"""What is read from run folders, and from nothing else."""
