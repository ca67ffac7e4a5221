"""Features that flash-attention's tests use and ferroflash does not have yet.

Their cases are left out of the selection, except for one case of each, which shows that ferroflash says
`NotImplementedError`. A feature that arrives is deleted here, and its tests then take part.
"""

# Parameter of a test: values that need the feature.
PARAMETERS = {
    "alibi": lambda value: value,
    "softcap": lambda value: value > 0.0,
    # The tests take the dropout mask from the attention probabilities that flash-attention returns.
    "dropout_p": lambda value: value > 0.0,
}

# Part of the name of a test function that needs the feature as a whole.
FUNCTIONS = ("varlen", "kvcache", "generator_arg")


def needs_missing_function(function):
    """Returns whether a test function as a whole needs a missing feature."""
    return any(part in function for part in FUNCTIONS)


def needs_missing_feature(name, value):
    """Returns whether the value of a test's parameter needs a missing feature."""
    return name in PARAMETERS and bool(PARAMETERS[name](value))
