__version__ = "0.1.0"


def __getattr__(name):
    "`actloc.detect` is loaded when it is asked for, so that importing actloc costs nothing."
    if name != "detect": raise AttributeError(f"module 'actloc' has no attribute {name!r}")
    from .app.detect import detect
    return detect
