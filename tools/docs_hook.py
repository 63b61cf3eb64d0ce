"""
What MkDocs does to the pages besides its plugins: links out of ``docs/`` lead to the repository, equations become MathML
(browsers show it without a script, also offline), the roles of docstrings (``:class:``) are left out, and ``\\|`` in the code
of a table, which GitHub needs, is ``|``.
"""

import re
from typing import Any

from latex2mathml.converter import convert

OUT_OF_DOCS = re.compile(r"\]\(\.\./([^)]+)\)")
EQUATION = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)
PIPE = re.compile(r"(?<=<code>)[^<]*\\\|[^<]*(?=</code>)")
ROLE = re.compile(r":(?:class|func|meth|mod|attr):(?=<code>|<a )")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    return OUT_OF_DOCS.sub(rf"]({config.repo_url}/blob/main/\1)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    def to_mathml(match: re.Match) -> str:
        tag, inline, block = match.groups()
        latex = (inline or block).replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
        return f"<{tag}>{convert(latex.strip(), display='inline' if inline else 'block')}</{tag}>"

    html = PIPE.sub(lambda match: match[0].replace("\\|", "|"), html)
    return ROLE.sub("", EQUATION.sub(to_mathml, html))
