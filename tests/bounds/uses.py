"""What an extra is for, done once: `uses.py USE ARTIFACT FOLDER` in an environment of run.py."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

TEXT = "The ferry to the island leaves at seven in the morning."


def vector(artifact: Path) -> np.ndarray:
    import jexport

    with jexport.open_artifact(artifact) as model:
        made: np.ndarray = model.encode([TEXT])[0]
    return made


def int8(artifact: Path, folder: Path) -> None:
    """Round a weight by GPTQ: what scipy and threadpoolctl are for."""
    from jexport.quantization import quant_params
    from jexport.quantization.gptq import gptq

    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(600, 96)).astype(np.float32) @ rng.normal(size=(96, 96))
    weight = rng.normal(size=(96, 64)).astype(np.float32)
    scales = quant_params.weight_scales(weight)
    lost = [
        float(np.linalg.norm(inputs @ (weight - qweight.astype(np.float32) * scales)))
        for qweight in (
            gptq(weight, (inputs.T @ inputs).astype(np.float32), scales),
            quant_params.round_to_nearest(weight, scales),
        )
    ]
    assert lost[0] < 0.9 * lost[1], lost


def langchain(artifact: Path, folder: Path) -> None:
    from jexport.serving.integrations.langchain import JexportEmbeddings

    made = JexportEmbeddings(artifact, artifact).embed_query(TEXT)
    np.testing.assert_allclose(made, vector(artifact), atol=1e-6)


def llama_index(artifact: Path, folder: Path) -> None:
    from jexport.serving.integrations.llama_index import JexportEmbedding

    made = JexportEmbedding(artifact, artifact).get_query_embedding(TEXT)
    np.testing.assert_allclose(made, vector(artifact), atol=1e-6)


def sign(artifact: Path, folder: Path) -> None:
    """Sign with a key, verify, and refuse another key."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from jexport.publishing import signing

    keys = []
    for name in ("own", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        private, public = folder / f"{name}.key", folder / f"{name}.pub"
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        public.write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
        keys.append((private, public))
    signing.sign(artifact, signing.Signer(key=keys[0][0]))
    codes = [
        subprocess.run(
            [sys.executable, "-m", "jexport", "verify", str(artifact), "--key", str(public)],
            capture_output=True,
            check=False,
        ).returncode
        for _, public in keys
    ]
    assert codes == [0, 34], codes


def publish(artifact: Path, folder: Path) -> None:
    """To a folder and back; the clients of the other places are imported."""
    import huggingface_hub
    import requests
    import s3fs

    assert all((huggingface_hub.HfApi, requests.Session, s3fs.S3FileSystem))
    said = subprocess.run(
        [sys.executable, "-m", "jexport", "publish", str(artifact), str(folder / "registry")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    pulled = subprocess.run(
        [sys.executable, "-m", "jexport", "pull", said.split()[-1], str(folder / "pulled")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert (Path(pulled.split()[-1]) / "manifest.json").is_file()


if __name__ == "__main__":
    use, artifact, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    {one.__name__: one for one in (int8, langchain, llama_index, sign, publish)}[use](
        artifact, folder
    )
