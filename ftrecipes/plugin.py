"""What a plugin file needs: the base class of methods and the decorators that register code by name.

    from ftrecipes.plugin import Method, method

    @method("mine", knobs={"strength": {"default": 0.1, "min": 0, "help": "how much"}})
    class Mine(Method):
        def penalty(self, run, batch, outputs): ...

`ftr train --plugin my_method.py method=mine` runs the file; a config can never do so.
"""

from ftrecipes.data.base import Splits
from ftrecipes.method import Method
from ftrecipes.registry import data, method, metric, reward

__all__ = ["Method", "Splits", "data", "method", "metric", "reward"]
