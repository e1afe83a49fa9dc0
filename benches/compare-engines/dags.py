"""The same graph of steps, written down for each engine.

A graph is a shape and a size; every step copies what it reads into one file. `in/` holds the files that no step makes.
"""

from pathlib import Path

SHAPES = ["wide", "leaves", "deep", "diamond"]


def edges(shape, n):
    """For each step its number and what it reads: names of files, or numbers of steps."""
    if shape == "wide":  # all read one file
        return [(i, ["in/0.txt"]) for i in range(n)]
    if shape == "leaves":  # each reads a file of its own
        return [(i, [f"in/{i}.txt"]) for i in range(n)]
    if shape == "deep":  # each reads the one before
        return [(i, [i - 1] if i else ["in/0.txt"]) for i in range(n)]
    if shape == "diamond":  # one, then many, then one that reads them all
        middle = [(i, [0]) for i in range(1, n - 1)]
        return [(0, ["in/0.txt"]), *middle, (n - 1, list(range(1, n - 1)))]
    raise ValueError(shape)


def inputs(directory, shape, n):
    (directory / "in").mkdir(parents=True, exist_ok=True)
    for i in range(n if shape == "leaves" else 1):
        (directory / "in" / f"{i}.txt").write_text(f"input {i}\n")


def names(reads):
    return [r if isinstance(r, str) else f"o/{r}.txt" for r in reads]


def ninja(directory, shape, n):
    lines = ["rule copy", "  command = cat $in > $out", ""]
    lines += [f"build o/{i}.txt: copy {' '.join(names(reads))}" for i, reads in edges(shape, n)]
    (directory / "build.ninja").write_text("\n".join(lines) + "\n")


def make(directory, shape, n):
    all_steps = edges(shape, n)
    lines = ["all: " + " ".join(f"o/{i}.txt" for i, _ in all_steps), "", ".SUFFIXES:", ""]
    for i, reads in all_steps:
        lines += [f"o/{i}.txt: {' '.join(names(reads))}", "\t@cat $^ > $@", ""]
    (directory / "o").mkdir(exist_ok=True)
    (directory / "Makefile").write_text("\n".join(lines))


def snakemake(directory, shape, n):
    lines = []
    if shape in ("wide", "leaves"):  # one rule with a wildcard, its fastest form
        source = "in/0.txt" if shape == "wide" else "in/{i}.txt"
        lines += [f'rule all:\n  input: expand("o/{{i}}.txt", i=range({n}))', ""]
        lines += [f'rule copy:\n  input: "{source}"\n  output: "o/{{i}}.txt"\n  shell: "cat {{input}} > {{output}}"']
    else:
        lines += [f'rule all:\n  input: "o/{n - 1}.txt"', ""]
        for i, reads in edges(shape, n):
            listed = ", ".join(f'"{name}"' for name in names(reads))
            lines += [f'rule r{i}:\n  input: {listed}\n  output: "o/{i}.txt"\n  shell: "cat {{input}} > {{output}}"', ""]
    (directory / "Snakefile").write_text("\n".join(lines) + "\n")


def dvc(directory, shape, n):
    lines = ["stages:"]
    for i, reads in edges(shape, n):
        files = names(reads)
        lines += [f"  s{i}:", f"    cmd: cat {' '.join(files)} > o/{i}.txt", "    deps:"]
        lines += [f"    - {name}" for name in files] + ["    outs:", f"    - o/{i}.txt"]
    (directory / "o").mkdir(exist_ok=True)
    (directory / "dvc.yaml").write_text("\n".join(lines) + "\n")


# The variable makes every step another one: steps that do the same on the same bytes are run once.
COPY = "cat ${in.src} > ${out.out}"


def pipe_matrix(directory, shape, n, run=COPY):
    """In the form a person would write: a step with a matrix."""
    step = f"stage: command, run: '{run}', out: {{ out: out.txt }}, env: {{ I: '%s' }}"
    one, many = step % "one", step % "${matrix.i}"
    every = "matrix: { i: 0..%d }"
    lines = ["name: bench", "steps:"]
    if shape in ("wide", "leaves"):
        source = "./in/0.txt" if shape == "wide" else "./in/${matrix.i}.txt"
        lines += [f"  s: {{ {every % n}, in: {{ src: '{source}' }}, {many} }}"]
    elif shape == "diamond":
        lines += [f"  a: {{ in: {{ src: './in/0.txt' }}, {one} }}"]
        lines += [f"  b: {{ {every % (n - 2)}, in: {{ src: a.out }}, {many} }}"]
        lines += [f"  c: {{ in: {{ src: 'b[*].out' }}, {one} }}"]
    else:
        return False
    (directory / "pipe.yaml").write_text("\n".join(lines) + "\n")


def pipe_shell(directory, shape, n):
    """With a second command, for which it takes a shell, as ninja does for each."""
    return pipe_matrix(directory, shape, n, COPY + "; :")


def pipe_written(directory, shape, n):
    """Every step written out."""
    lines = ["name: bench", "steps:"]
    for i, reads in edges(shape, n):
        sources = [f"./{r}" if isinstance(r, str) else f"s{r}.out" for r in reads]
        source = sources[0] if len(sources) == 1 else "[" + ", ".join(sources) + "]"
        lines += [f"  s{i}:", "    stage: command", f"    in: {{ src: {source} }}", f"    run: '{COPY}'", "    out: { out: out.txt }", f"    env: {{ I: '{i}' }}"]
    (directory / "pipe.yaml").write_text("\n".join(lines) + "\n")


def text_matrix(directory, shape, n):
    """A built-in stage: no process is started for a step."""
    if shape != "leaves":
        return False
    (directory / "pipe.yaml").write_text(
        "name: bench\nsteps:\n"
        f"  s: {{ stage: text, matrix: {{ i: 0..{n} }}, in: {{ files: './in/${{matrix.i}}.txt' }} }}\n"
    )


WRITERS = {
    "pipe": pipe_matrix,
    "pipe (written out)": pipe_written,
    "pipe (in a shell)": pipe_shell,
    "pipe (built-in stage)": text_matrix,
    "ninja": ninja,
    "make": make,
    "Snakemake": snakemake,
    "DVC": dvc,
}


def write(engine, directory, shape, n):
    """Writes inputs and the graph; `False` where the engine has no such form."""
    directory = Path(directory)
    inputs(directory, shape, n)
    return WRITERS[engine](directory, shape, n) is not False
