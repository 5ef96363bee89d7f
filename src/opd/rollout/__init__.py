"""Where responses come from and how they become batches.

`local` samples from a model in this process, `fast` is its path for Llama-like shapes, and `pack`
turns a rollout into the tensors the student's forward takes.
"""
