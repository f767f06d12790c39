"""The embedded default: tasks that need no download, and weights of tiny models for them.

``examples/embedded_models`` of the repository makes the weights; its README describes them.
"""
