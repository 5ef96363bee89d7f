"""Prompts, chat templates, built-in tasks and verifiers.

The package itself imports nothing, and `tasks` and `settings` import neither torch nor
transformers, so that listing and checking stay fast.
"""
