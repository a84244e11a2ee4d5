"""The page of chosen samples of the sources of a run, and what the run would say of each source."""

from __future__ import annotations

from data.check.certificate import certify
from model.errors import DataError
from tools.inspector.choose import Source
from tools.inspector.page_html import Shown, page


def certified(source: Source) -> tuple[str, bool]:
    """Return the certificate of a source or why it has none, and whether the run would refuse it."""
    index = source.dataset.indexes[source.source_id]
    try:
        return str(certify(source.dataset.template, index, source.config.key, max_length=source.dataset.config.max_length)), False
    except DataError as error:
        return str(error), True


def sources_page(title: str, words: str, sources: list[Source]) -> tuple[str, list[bool]]:
    """Return the document, and for each source whether the run would refuse it. `words` describe the selection."""
    shown = []
    for source in sources:
        certificate, refused = certified(source)
        about = Shown(
            table=source.table,
            name=source.config.key,
            path=source.config.path,
            size=source.pool.size,
            part=source.part,
            kinds=source.kinds,
            lengths=source.dataset.lengths[source.pool.ids],
            lengths_kind=source.opened.lengths_kind,
            certificate=certificate,
            refused=refused,
            num_shown=len(source.chosen),
        )
        shown.append((about, source.entries()))
    text = page(title, words, sources[0].opened.config.data.max_length, shown)
    return text, [source.refused for source, _ in shown]
