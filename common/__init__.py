"""Helpers without any algorithm: no loss, target, schedule, sampler or network lives here."""
