"""Makers of demonstrations, which a script calls through common/demos, and commands beside the scripts."""
