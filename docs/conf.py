"""Sphinx: `python -m sphinx -W docs docs/_build/html`."""

from importlib import metadata

project = "smartload"
copyright = "the smartload authors"
release = metadata.version("torch-smartload")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"smartload {release}"
exclude_patterns = ["_build"]

myst_heading_anchors = 3  # the README links to headings
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
default_role = "code"  # docstrings write `names` in single backticks
python_maximum_signature_line_length = 88
