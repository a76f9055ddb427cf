"""Tests on a real cluster: `make test-cluster`. Without TEST_KUBECONFIG they are skipped.

TEST_KUBECONFIG          the cluster; not KUBECONFIG, so that `make test` never touches one that happens to be set
TEST_IMAGE_TAG           tag of triton-trtllm/{server-cpu,server-demo,builder,client} on its nodes (default: dev)
TEST_NODE_COMMAND        a program that takes `NODE lose|cut|join`, for the tests in which a node vanishes
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator

import loads
import pytest
from cluster_client import Namespace, kubectl


@pytest.fixture(scope="session", autouse=True)
def _cluster() -> None:
    if "TEST_KUBECONFIG" not in os.environ:
        pytest.skip("no TEST_KUBECONFIG, so no cluster to try the chart on")
    if missing := [program for program in ("kubectl", "helm") if not shutil.which(program)]:
        pytest.skip(f"no {' and no '.join(missing)} on PATH")
    os.environ["KUBECONFIG"] = os.environ["TEST_KUBECONFIG"]


@pytest.fixture(scope="session")
def image_tag() -> str:
    return os.environ.get("TEST_IMAGE_TAG", "dev")


@pytest.fixture(scope="module")
def make_namespace(_cluster: None, image_tag: str) -> Iterator[Callable[[str], Namespace]]:
    """Makes namespaces with a level of Pod Security; they go when the module's tests are over."""
    names: list[str] = []

    def make(level: str) -> Namespace:
        name = f"llm-test-{secrets.token_hex(3)}"
        kubectl("create", "namespace", name)
        names.append(name)
        kubectl("label", "namespace", name, f"pod-security.kubernetes.io/enforce={level}")
        return Namespace(name, image_tag)

    yield make
    for name in names:
        # Pods that drain need not be waited for.
        kubectl("--namespace", name, "delete", "deployment", "--all", "--wait=false")
        kubectl("--namespace", name, "delete", "pods", "--all", "--force", "--grace-period=0")
        kubectl("delete", "namespace", name, "--wait=false")


# ---- a service under load, for the tests in which Pods go away


@pytest.fixture(scope="module")
def namespace(make_namespace: Callable[[str], Namespace]) -> Namespace:
    return make_namespace("privileged")


@pytest.fixture(scope="module")
def nodes(namespace: Namespace) -> list[str]:
    return sorted(node["metadata"]["name"] for node in namespace.get("nodes"))


@pytest.fixture(scope="module")
def service(namespace: Namespace) -> Iterator[str]:
    namespace.install(
        "llm", *loads.SYNTHETIC, f"engine.node.path=/mnt/node/{namespace.name}", f"replicas={loads.REPLICAS}", wait=240
    )
    yield "llm"
    namespace.helm("uninstall", "llm", "--wait=false")
