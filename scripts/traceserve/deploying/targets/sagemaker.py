"""`sagemaker`: model.tar.gz and an image that follows SageMaker's contract, by traceserve_hosts.sagemaker."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path
from typing import Sequence

from traceserve_hosts.web import DIGEST_VARIABLE

from traceserve.deploying import engines, templates
from traceserve.deploying.described import Described
from traceserve.deploying.plan import DeployTarget, Made, Plan, Wishes, prefixed
from traceserve.deploying.targets import docker
from traceserve.deploying.targets.kubernetes import plain_name

# A small instance for each hardware.
_INSTANCES = {"cpu": "ml.c7i.xlarge", "gpu": "ml.g5.xlarge", "neuron": "ml.inf1.xlarge", "neuronx": "ml.inf2.xlarge"}


def plan(archives: Sequence[Described], wishes: Wishes) -> Plan:
    """The model's files, the image's, and the calls of AWS that make an endpoint of them."""
    archive = engines.only(archives, "a SageMaker model")
    name, image = plain_name(archive.name), docker.image_name(archives, wishes)
    end = templates.read_template("sagemaker/end")
    about = f"SageMaker's container for {archive.name}; made by `traceserve deploy sagemaker`."
    place = f"{wishes.url.rstrip('/')}/model.tar.gz" if wishes.url else f"s3://BUCKET/{name}/model.tar.gz"
    instance = _INSTANCES[archive.manifest.hardware]
    variant = f"VariantName=all,ModelName={name},InstanceType={instance},InitialInstanceCount=1"
    return Plan(
        (
            Made("model.tar.gz", lambda target: pack_model(archive.file, target)),
            *prefixed(
                "image", docker.common_files(archives, engines.CONTAINER_ENGINES[wishes.engine].packages, about, end)
            ),
        ),
        (
            f"{docker.build_and_push(image)}  # to Amazon ECR",
            f"aws s3 cp model.tar.gz {place}",
            f"aws sagemaker create-model --model-name {name} --execution-role-arn $ROLE "
            f"--primary-container Image={image},ModelDataUrl={place},Environment={{{DIGEST_VARIABLE}={archive.sha256}}}",
            f"aws sagemaker create-endpoint-config --endpoint-config-name {name} --production-variants "
            f"{variant},ContainerStartupHealthCheckTimeoutInSeconds=600",
            f"aws sagemaker create-endpoint --endpoint-name {name} --endpoint-config-name {name}",
        ),
        ("who may ask is decided by IAM: SageMaker checks it before a request reaches the container.",),
    )


def pack_model(archive: Path, target: Path) -> None:
    """The archive, as SageMaker unpacks it into /opt/ml/model; equal archives give equal bytes. The container compares its
    SHA-256 before it unpacks the rest."""
    # Weights do not compress: the quickest level.
    with target.open("wb") as raw, gzip.GzipFile("", "wb", 1, raw, mtime=0) as packed:
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
            tar.add(archive, archive.name, filter=_undated)


def _undated(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
    info.mode = 0o644
    return info


TARGET = DeployTarget(
    ("uvicorn",),
    plan,
    schemes=("s3",),
)
