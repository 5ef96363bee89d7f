"""The loop: sample, score, signal, update, measure, save, evaluate."""
