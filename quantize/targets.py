"""The `publish` block of a recipe: where the artifact goes, and who vouches for it."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from quantize.block import Block


def _repo_name(name: str) -> str:
    """By the Hub's own rules, with its words."""
    from huggingface_hub.errors import HFValidationError  # only recipes with a hub block pay for it
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if name.count("/") != 1:
        raise ValueError(f"{name!r} is not owner/name")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(str(error).removesuffix(".")) from error
    return name


def _ref_name(name: str) -> str:
    """What git (check-ref-format) and the Hub take for the name of a branch or a tag."""
    if NO_REF.search(name) or name == "@":
        raise ValueError(f"{name!r} cannot name a branch or a tag")
    if name.startswith("refs/") or COMMIT.fullmatch(name):
        raise ValueError(f"{name!r} would be taken for something else than a branch or a tag")
    return name


NO_REF = re.compile(
    r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[-/.]|/\.|[/.]$|\.lock(/|$)|^$|^.{201,}$"
)
COMMIT = re.compile(r"[0-9a-f]{40}")
RepoName = Annotated[str, AfterValidator(_repo_name)]
RefName = Annotated[str, AfterValidator(_ref_name)]
CollectionSlug = Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]


class Hub(Block):
    """A repository on the Hub."""

    repo: RepoName = Field(description="owner/name")
    private: bool = Field(True, description="Visibility when the repository is created.")
    allow_public: bool = Field(
        False, description="A private or gated source may go to a repository that is open to more."
    )
    branch: RefName = Field("main", description="The branch that receives the commit.")
    pull_request: bool = Field(
        False, description="Open a pull request against main instead of committing to it."
    )
    tag: RefName | None = Field(None, description="A tag for the commit, e.g. v1.")
    collection: CollectionSlug | None = Field(
        None, description="The slug of a collection (owner/title-id) that gets the repository."
    )

    @model_validator(mode="after")
    def _pull_request_fits(self) -> Hub:
        if self.pull_request and self.branch != "main":
            raise ValueError("a pull request goes to main: remove branch or pull_request")
        if self.pull_request and self.tag is not None:
            raise ValueError(
                "a tag names what is on the branch, a pull request is not yet: remove one of them"
            )
        return self


def _writable_url(url: str) -> str:
    """`url` without a slash at its end, if it can name a place to publish to and holds no secret.

    No message repeats the URL: it may hold a password.
    """
    scheme, colon, rest = url.partition("://")
    host, _, path = rest.partition("/")
    if not colon or not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
        raise ValueError("expected a URL such as s3://bucket/prefix")
    if "@" in host and ":" in host.rpartition("@")[0]:
        raise ValueError(
            "a URL with a password would end up in files and logs: remove it, and give the "
            "credentials by variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or ~/.aws"
        )
    if "?" in rest or "#" in rest or "::" in url:
        raise ValueError("expected a plain URL: no ?, no #, no ::, signatures least of all")
    if scheme in ("http", "https"):
        raise ValueError(
            "nothing can be published to http(s); for an S3 of your own write s3://bucket/prefix "
            "and set AWS_ENDPOINT_URL to its address"
        )
    if scheme == "hf":
        raise ValueError("use publish.hub for a repository on the Hub")
    if scheme == "file" and (host or not path.strip("/")):
        raise ValueError("expected file:/// and an absolute path of a folder")
    if not rest.strip("/"):
        raise ValueError("the URL names no place: add a bucket or a path")
    return url.rstrip("/")


Url = Annotated[str, AfterValidator(_writable_url)]


VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""Of an environment variable; a secret itself does not belong into a recipe."""


class Sign(Block):
    """Who vouches for what is published: the holder of a key, or an identity of Sigstore."""

    key: str | None = Field(
        None,
        min_length=1,
        description="A private key (PEM; P-256, P-384, P-521), relative to the working directory.",
    )
    password_variable: VariableName | None = Field(
        None, description="The environment variable with the key's password."
    )
    keyless: bool = Field(
        False, description="Sign with a short-lived certificate of Sigstore instead of a key."
    )
    identity_token_variable: VariableName | None = Field(
        None,
        description="keyless: the environment variable with the OpenID Connect token; without it, "
        "what the CI system offers.",
    )

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Sign:
        if (self.key is None) == (not self.keyless):
            raise ValueError("give either key, or keyless: true")
        if self.key is None and self.password_variable is not None:
            raise ValueError("password_variable without key: name the key or remove it")
        if not self.keyless and self.identity_token_variable is not None:
            raise ValueError("identity_token_variable is for keyless: true")
        return self


class Publish(Block):
    """Where the artifact goes."""

    folder: str | None = Field(None, description="A folder (relative to the working directory).")
    hub: Hub | None = Field(None, description="A Hub repository; needs a token that may write.")
    url: Url | None = Field(
        None, description="A bucket (s3://bucket/prefix) or another place that fsspec can write."
    )
    sign: Sign | None = Field(
        None, description="Sign what is published; needs `pip install 'quantize[sign]'`."
    )
    card_template: str | None = Field(
        None,
        min_length=1,
        description="A Jinja template for the model card (relative to the recipe file).",
    )

    @property
    def wanted(self) -> bool:
        """Whether there is any target."""
        return not (self.folder is None and self.hub is None and self.url is None)

    @property
    def secret_variables(self) -> frozenset[str]:
        """Names of the environment variables that hold secrets of this block."""
        named = (
            (self.sign.password_variable, self.sign.identity_token_variable) if self.sign else ()
        )
        return frozenset(name for name in named if name is not None)
