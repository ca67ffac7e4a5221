"""Features that the peers' tests use and ferroflash does not have yet.

Such a case has to raise `NotImplementedError`, and is reported as skipped. Of flash-attention's, one case of each
feature is kept in the selection. A feature that arrives is deleted here, and its tests then take part.
"""

# For each peer: parameter of a test, and which of its values need the feature.
PARAMETERS = {"flag-attn": {}, "flash-attn": {"paged_kv_block_size": lambda size: size is not None}}

# For each peer: part of the name of a test function that needs the feature as a whole.
FUNCTIONS = {"flag-attn": ("paged",), "flash-attn": ("kvcache", "paged", "generator_arg")}


def missing_function(peer, function):
    """Returns whether a test function as a whole needs a missing feature."""
    return any(part in function for part in FUNCTIONS[peer])


def missing_value(peer, name, value):
    """Returns whether the value of a test's parameter needs a missing feature."""
    return name in PARAMETERS[peer] and bool(PARAMETERS[peer][name](value))
