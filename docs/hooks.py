"""What mkdocs needs to be told: chapters are notebooks, and links lead to files of the repository as on GitHub.

A page of the site comes from one file of the repository, and `page_of` says which. Links stand in the texts as GitHub
wants them, from file to file; here they become links from page to page. A file that is linked and is no document, such
as a module, gets a page that shows it. Whatever then leads nowhere, `mkdocs build --strict` refuses.
"""

import os
import posixpath
import re
from pathlib import Path

from jinja2 import DictLoader
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
#: Documents outside docs/ that are pages.
DOCUMENTS = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
MARKDOWN_LINK = re.compile(r"(\]\()([^()\s#]+)((?:#[^()\s]*)?\))")
HTML_LINK = re.compile(r"""(\b(?:href|src)=["'])([^"'#]+)((?:#[^"']*)?["'])""")
LANGUAGES = {".py": "python", ".sh": "bash", ".toml": "toml", ".yml": "yaml", ".json": "json", "": "make"}
#: Outputs as blocks of their own class, beside code; figures with the caption below them as their description.
TEMPLATE = """
{%- extends 'markdown/index.md.j2' -%}
{%- block stream -%}
{{ fenced(output.text) }}
{%- endblock -%}
{%- block data_text -%}
{{ fenced(output.data['text/plain']) }}
{%- endblock -%}
{%- macro fenced(text) %}
~~~~~~ { .text .output {{ '.sentence' if '\n' not in text.strip() }} }
{{ text | strip_ansi | trim('\\n') }}
~~~~~~
{% endmacro -%}
"""

_origins: dict[str, str] = {}  # page -> the file of the repository that it shows, where that is not docs/PAGE


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files under docs/."""
    _origins.clear()
    for document, page in DOCUMENTS.items():
        if page not in files.src_uris:
            add(files, config, page, document, (ROOT / document).read_text())
    for notebook in sorted(ROOT.glob("tutorials/[0-9][0-9]_*.ipynb")):
        add_chapter(files, config, notebook)
    waiting = list(files.documentation_pages())
    while waiting:  # a document that is linked may link others
        page = waiting.pop()
        for path in linked(page):
            if page_of(path) not in files.src_uris and (ROOT / path).is_file():
                waiting.append(add_source(files, config, path))
    return files


def on_page_markdown(markdown: str, page: Page, **_) -> str:
    """Links from file to file become links from page to page."""
    return rewritten(markdown, page.file.src_uri)


def page_of(path: str) -> str:
    """The page, or file of the site, that stands for a file of the repository."""
    folder, _, name = path.partition("/")
    if path in DOCUMENTS:
        return DOCUMENTS[path]
    if folder == "docs" and not path.endswith(".py"):
        return name
    if folder == "tutorials" and re.fullmatch(r"\d\d_\w+\.(ipynb|py)", name):
        return f"tutorials/{Path(name).stem}.md"
    return f"source/{path}.md"


def origin_of(page: str) -> str:
    return _origins.get(page, f"docs/{page}")


def add(files: Files, config: MkDocsConfig, uri: str, origin: str, content: str | bytes) -> File:
    file = File.generated(config, uri, content=content)
    files.append(file)
    _origins[uri] = origin
    return file


def add_chapter(files: Files, config: MkDocsConfig, notebook: Path) -> None:
    """A notebook as a page, with its figures beside it."""
    exporter = MarkdownExporter(extra_loaders=[DictLoader({"site.md.j2": TEMPLATE})], template_file="site.md.j2")
    resources = {"output_files_dir": notebook.stem, "unique_key": "figure"}
    text, resources = exporter.from_filename(str(notebook), resources)
    origin = notebook.relative_to(ROOT).as_posix()
    add(files, config, page_of(origin), origin, described(text))
    for name, image in resources["outputs"].items():
        add(files, config, f"tutorials/{name}", origin, image)


def described(text: str) -> str:
    """The caption, an emphasised paragraph below a figure, is also its description for those who cannot see it."""

    def describe(match: re.Match) -> str:
        caption = re.sub(r"[*_`$\\\[\]]", "", match["caption"]).replace("\n", " ")
        figure = f"[![{caption}]({match['path']})]({match['path']})"  # a click shows it at its size
        return f"{figure}\n\n{match['mark']}{match['caption']}{match['mark']}"

    return re.sub(r"!\[\w+\]\((?P<path>[^)]+)\)\s+(?P<mark>[*_])(?P<caption>[^*_\n].*?)(?P=mark)(?=\n\n|\s*$)",
                  describe, text, flags=re.DOTALL)  # fmt: skip


def add_source(files: Files, config: MkDocsConfig, path: str) -> File:
    """A page that shows a file: documents as documents, everything else as it stands."""
    text = (ROOT / path).read_text()
    if not path.endswith(".md"):
        language = LANGUAGES.get(Path(path).suffix, "text")
        text = f"# `{path}`\n\n~~~~~~ {{ .{language} linenums=1 }}\n{text}\n~~~~~~\n"
    return add(files, config, page_of(path), path, f"---\nsearch: {{exclude: true}}\nhide: [toc]\n---\n{text}")


def targets(text: str, origin: str) -> list[str]:
    """Files of the repository that a text links to."""
    links = [match[2] for pattern in (MARKDOWN_LINK, HTML_LINK) for match in pattern.finditer(text)]
    return [path for link in links if (path := resolved(link, origin))]


def linked(page: File) -> list[str]:
    return targets(page.content_string, origin_of(page.src_uri))


def resolved(link: str, origin: str) -> str | None:
    """The path in the repository that a link in the file `origin` means, if it is one."""
    if ":" in link or link.startswith("/"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    return None if path.startswith("..") or not (ROOT / path).exists() else path


def rewritten(text: str, page: str) -> str:
    origin, folder = origin_of(page), posixpath.dirname(page)

    def rewrite(match: re.Match, html: bool) -> str:
        path = resolved(match[2], origin)
        if path is None or (ROOT / path).is_dir():
            return match[0]  # mkdocs says what it thinks of it
        target = os.path.relpath(page_of(path), folder or ".")
        if html:  # mkdocs leaves these as they are
            target = re.sub(r"\.md$", ".html", target)
        return f"{match[1]}{target}{match[3]}"

    text = MARKDOWN_LINK.sub(lambda match: rewrite(match, html=False), text)
    return HTML_LINK.sub(lambda match: rewrite(match, html=True), text)
