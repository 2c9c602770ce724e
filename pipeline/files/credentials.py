"""Finds logins and tokens in addresses, refuses them, and removes them from stored or printed text.

An address that a user gives is written to logs, MLflow's parameters, `run.json`, checkpoints and registered versions,
so it must not hold a secret. Addresses are `scheme://...`; a plain path never holds a login. A refused address is a
ConfigError.
"""

import re
from urllib.parse import unquote_plus

from pipeline.errors import ConfigError

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]*")  # within a text
HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d+)?")
CHAIN = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.-]*://)")  # fsspec's: zip://a.zip::s3://bucket
# Names of query parameters: MLflow's and databases', signed URLs of S3, GCS and Azure, tokens of web servers.
SECRET = re.compile(
    r"passw|passphrase|^pass$|pwd|secret|token|^sig$|signature|credential|(api|access|account).?key|^key$|^auth", re.I
)
INNER_SECRET = re.compile(r"(pwd|password)\s*=", re.I)  # within a value, as in mssql's odbc_connect
DATABASES = ("postgresql", "postgres", "mysql", "mariadb", "mssql", "oracle")
WEB = ("http", "https")
INSTEAD = {
    **dict.fromkeys(("s3", "s3a", "r2"), "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials"),
    **dict.fromkeys(("gs", "gcs"), "set GOOGLE_APPLICATION_CREDENTIALS"),
    **dict.fromkeys(
        ("az", "abfs", "abfss"), "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or _SAS_TOKEN"
    ),
    **dict.fromkeys(("postgresql", "postgres"), "set PGUSER and PGPASSWORD, or use ~/.pgpass"),
    **dict.fromkeys(("mysql", "mariadb"), "add ?read_default_file=FILE to the address, with the login in that file"),
    "mssql": "let an MLflow server open the database and give its address",
}
TRACKING_INSTEAD = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
STORE_INSTEAD = "put it into fsspec's configuration (~/.config/fsspec)"


def holds_login(address: str) -> bool:
    """Whether an address holds a password or a token, also as a query parameter."""
    return without_login(address) != address


def without_login(address: str) -> str:
    """Remove what `holds_login` finds from an address; a database's user name is kept."""
    return "::".join(_plain(part) for part in CHAIN.split(address))


def redact(text: str) -> str:
    """Remove logins from all addresses in a text."""
    return ADDRESS.sub(lambda found: without_login(found[0]), text)


def refuse_login(address: str, key: str) -> None:
    """Refuse an address that holds a login; the message does not repeat it.

    Args:
        address: URL or path.
        key: its setting or flag, e.g. `storage` or `--tracking-uri`.

    Raises:
        ConfigError: the address holds a login; the message names the environment variables to use instead.
    """
    if fault := login_fault(address, key):
        raise ConfigError(fault)


def login_fault(address: str, key: str) -> str:
    """The message of `refuse_login`, or an empty string."""
    if not holds_login(address):
        return ""
    part = next(part for part in CHAIN.split(address) if holds_login(part))
    scheme = part.partition("://")[0].partition("+")[0].lower()
    instead = TRACKING_INSTEAD if scheme in WEB and "tracking" in key.lower() else INSTEAD.get(scheme, STORE_INSTEAD)
    return f"{key}: the address holds a login or a token, which would be stored and printed; leave it out and {instead}"


def _plain(address: str) -> str:
    scheme, separator, rest = address.partition("://")
    if not separator:
        return address
    kind = scheme.partition("+")[0].lower()
    user, host = _split_user(kind, rest)
    if user is not None and (":" in user or kind in WEB):
        name = user.partition(":")[0]
        rest = f"{name}@{host}" if kind in DATABASES and name else host
    start, mark, query = rest.partition("?") if "?" in rest else rest.partition("#")
    if not mark:
        return f"{scheme}://{rest}"
    kept = [part for part in re.split(r"[&;#]", query) if not _is_secret(part)]
    if len(kept) == len(re.split(r"[&;#]", query)):
        return f"{scheme}://{rest}"
    return f"{scheme}://{start}" + (mark + "&".join(kept) if kept else "")


def _split_user(kind: str, rest: str) -> tuple[str | None, str]:
    """Split what follows `://` into user part and rest. A password may hold an unescaped '@', '/', '?' or '#'."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, _ = authority.rpartition("@")
    if at and ":" not in user:
        return user, rest[len(user) + 1 :]
    whole, found, host = rest.rpartition("@")
    unescaped = ":" in authority and (kind in DATABASES or not HOST.fullmatch(authority))
    return (whole, host) if found and (at or unescaped) else (None, rest)


def _is_secret(parameter: str) -> bool:
    name, _, value = parameter.partition("=")
    return bool(value) and bool(SECRET.search(unquote_plus(name)) or INNER_SECRET.search(unquote_plus(value)))
