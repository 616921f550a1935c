"""Settings of the documentation: ``sphinx-build -W --keep-going -b html docs OUT``, OUT outside the repository."""

from sphinx.ext.napoleon.docstring import GoogleDocstring

import ec_agents

project = "ec_agents"
author = "The ec_agents maintainers"
copyright = author  # noqa: A001 - the name that Sphinx reads
version = release = ec_agents.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]

html_theme = "furo"
html_title = f"ec_agents {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"

# The text below a field is prose; napoleon would take what stands before its first colon for the field's type.
GoogleDocstring._parse_attribute_docstring = GoogleDocstring._consume_to_end  # noqa: SLF001
