"""ftrecipes: the fine-tuning methods of the literature behind one declarative command.

From Python: `from ftrecipes.compose import compose`, `from ftrecipes.run import Run`, and for methods of one's own
`from ftrecipes.plugin import Method, method`.
"""

__version__ = "0.1.0"
