"""Helpers without knowledge of models: configuration, registries, files, validation, provenance, Hub, seeds."""
