"""`jexport verify`, `jexport inspect` and `jexport list`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from jexport.cli import flags
from jexport.cli.sign import policy, policy_options

MIB = 1 << 20


@click.command()
@click.argument("artifact", type=flags.PATH)
@policy_options
@flags.quiet("Only the exit code.")
def verify(artifact: Path, quiet: bool, **who: Any) -> None:
    """Check every file of an artifact against its manifest, and whose signature it has."""
    from jexport.artifacts import manifest
    from jexport.publishing import signing

    asked = policy(**who)
    verified = signing.verify(artifact, asked) if asked else manifest.verify(artifact)
    files = verified.content["files"]
    if not quiet:
        size = sum(entry["size_bytes"] for entry in files) / MIB
        whose = f", signed by {asked.identity or asked.key}" if asked else ""
        click.echo(f"{artifact}: {len(files)} files, {size:,.1f} MiB, all as built{whose}")


@click.command()
@click.argument("artifact", type=flags.PATH)
@flags.as_json("The whole manifest as JSON.")
def inspect(artifact: Path, as_json: bool) -> None:
    """Show what an artifact says about itself (its files are not checked; see verify)."""
    from jexport.artifacts import manifest, store

    content = manifest.read(artifact).content
    if as_json:
        click.echo(json.dumps(content, indent=2, ensure_ascii=False))
        return
    for name, value in _facts(content):
        click.echo(f"{name:<22}{value}")
    stages = store.measured(artifact).get("stages", ())
    if stages:  # beside the artifact where it was built, and not where it was copied to
        click.echo("\nstage        seconds   peak memory  note")
    for record in stages:
        memory = f"{record['peak_memory_mib']:,.0f} MiB"
        line = f"{record['stage']:<10}{record['seconds']:>10.1f}{memory:>14}  {record['note']}"
        click.echo(line.rstrip())
    click.echo(f"\n{'file':<40}{'bytes':>16}  SHA-256")
    for entry in content["files"]:
        click.echo(f"{entry['path']:<40}{entry['size_bytes']:>16,}  {entry['sha256'][:16]}")


def _facts(content: Any) -> list[tuple[str, str]]:
    embedding, parity, checkpoint = content["embedding"], content["parity"], content["checkpoint"]
    sizes = ", ".join(str(size) for size in embedding["matryoshka"]) or "full size only"
    origin = f"{checkpoint['name']} ({checkpoint['layout']}) {checkpoint['revision']}"
    return [
        ("name", content["name"]),
        ("version", content["version"]),
        ("task", content["task"]),
        ("target", f"{content['target']} {content['precision']}"),
        *_runs_on(content),
        ("checkpoint", origin.strip()),
        ("licence", content["licence"] or "not stated"),
        ("prompt", repr(embedding["prompt"])),
        *_prompts(embedding),
        ("pooling", embedding["pooling"] + (", normalised" if embedding["normalize"] else "")),
        ("dimension", f"{embedding['dimension']} (Matryoshka: {sizes})"),
        *(
            [("cut to", f"{embedding['truncate_dim']} dimensions, after normalising")]
            if embedding.get("truncate_dim")
            else []
        ),
        ("similarity", embedding.get("similarity", "cosine")),
        ("length limit", f"{embedding['max_tokens']} tokens"),
        ("embedding space", embedding["space"][:16]),
        ("outputs", ", ".join(spec["name"] for spec in content["engine"]["outputs"])),
        (
            "parity",
            f"lowest cosine {parity['cosine_min']:.8f}, mean {parity['cosine_mean']:.8f}, "
            f"top-10 overlap {parity['top10_overlap']:.4f} on {parity['texts']} texts",
        ),
    ]


def _prompts(embedding: Any) -> list[tuple[str, str]]:
    """A line for each named prompt that differs from the default one."""
    default = embedding.get("default_prompt_name", "")
    return [
        (f"prompt {name}"[:18], repr(text))
        for name, text in embedding.get("prompts", {}).items()
        if name != default and text
    ]


def _runs_on(content: Any) -> list[tuple[str, str]]:
    from jexport.serving import servers

    if not servers.is_for_cuda(content):
        return []
    steps = content["engine"]["facts"]["cuda"]["steps"]
    changed = ", ".join(name for name, count in steps.items() if count)
    return [("made for", f"CUDA alone ({changed})")]


@click.command("list")
@click.argument("where", metavar="[DEST]", default="artifacts")
@flags.as_json("As a JSON list.")
@flags.plain_http
def list_(where: str, as_json: bool, plain_http: bool) -> None:
    """List the artifacts below a folder (default: artifacts), or what is published in DEST.

    DEST is where `jexport publish` put them: a folder, s3://, oci:// or hf://. Its rows have the
    `ref` that `jexport pull` takes.
    """
    from jexport.publishing.registries import folder

    if "://" in where or folder.is_registry(Path(where)):
        rows = _published(where, plain_http)
    else:
        rows = _built(Path(where))
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    if not rows:
        click.echo(f"no artifacts below {where}", err=True)
        return
    click.echo(
        f"{'name':<22}{'task':<19}{'target':<13}{'MiB':>9}  {'cosine':<11}{'licence':<15}version"
    )
    for row in rows:
        target = f"{row['target']}-{row['precision']}"
        names = row.get("tags") or (["latest"] if row.get("latest") else [])
        mark = f"  ({', '.join(names)})" if names else ""
        click.echo(
            f"{row['name']:<22}{row['task']:<19}{target:<13}{row['size_bytes'] / MIB:>9,.1f}"
            f"  {row['cosine_min']:<11.7f}"
            f"{row['licence'] or 'not stated':<14} {row['version']}{mark}"
        )
        if "ref" in row:
            click.echo(f"  {row['ref']}")


def _built(folder: Path) -> list[dict[str, Any]]:
    """The artifacts below a folder."""
    from jexport.artifacts import store

    rows: list[dict[str, Any]] = []
    for artifact in store.artifacts(folder):
        content = artifact.manifest.content
        rows.append(
            {
                "path": str(artifact.path),
                "name": content["name"],
                "task": content["task"],
                "target": content["target"],
                "precision": content["precision"],
                "version": content["version"],
                "latest": store.is_latest(artifact),
                "size_bytes": sum(entry["size_bytes"] for entry in content["files"]),
                "cosine_min": content["parity"]["cosine_min"],
                "space": content["embedding"]["space"],
                "licence": content["licence"],
            }
        )
    return rows


def _published(where: str, plain_http: bool) -> list[dict[str, Any]]:
    """The releases in a registry."""
    from jexport.publishing import listing, registries

    listed = listing.read(registries.parse(where), registries.Access(plain_http=plain_http))
    for trouble in listed.troubles:
        click.echo(f"not listed: {trouble}", err=True)
    return [
        {
            "ref": row.ref,
            "digest": row.release.digest,
            "tags": list(row.tags),
            **{
                name: row.release.facts[name]
                for name in ("name", "task", "target", "precision", "version", "licence")
            },
            "size_bytes": row.release.size_bytes,
            "cosine_min": float(row.release.facts["cosine_min"]),
            "space": row.release.facts["space"],
            "manifest_sha256": row.release.manifest.blob.hex,
            "attested": [each.path for each in row.release.layers if each.beside],
        }
        for row in listed.rows
    ]


COMMANDS = {"verify": verify, "inspect": inspect, "list": list_}
