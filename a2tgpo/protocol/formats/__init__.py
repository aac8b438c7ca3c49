"""The forms in which models write tool calls. `rollout.call_format` names a module.

Each module has an object `FORMAT`, a `CallFormat`.
"""
