"""Amazon S3, and what speaks its protocol, through boto3."""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from beam_nifti.storage.object_store import SILENCE, Listing, ObjectStore, Pieces, Reader, Stat, split_path

_CONNECTIONS: Final = 64
_TOO_LARGE_TO_COPY: Final = ((400, "InvalidRequest"), (400, "EntityTooLarge"))  # more than 5 GiB


class S3(ObjectStore):
    """S3."""

    def __init__(self, options: Any) -> None:
        import boto3
        from botocore import exceptions
        from botocore.config import Config

        self._lost = (
            exceptions.HTTPClientError,
            exceptions.ConnectionError,  # refused, or the name of the server not found
            exceptions.ResponseStreamingError,
            exceptions.IncompleteReadError,
            exceptions.FlexibleChecksumError,
        )
        self.client = boto3.session.Session().client(
            "s3",
            **_flags(options),
            config=Config(
                retries={"total_max_attempts": 1},  # `attempt` is the one that retries
                connect_timeout=SILENCE,
                read_timeout=SILENCE,
                max_pool_connections=_CONNECTIONS,
            ),
        )

    def _host(self, path: str) -> str:
        return super()._host(self.client.meta.endpoint_url)

    @staticmethod
    def _answer(error: BaseException) -> tuple[int | None, str]:
        response = getattr(error, "response", None) or {}
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status, response.get("Error", {}).get("Code", "")

    def stat(self, path: str) -> Stat:
        bucket, key = split_path(path)
        return _stat(self.attempt(path, lambda: self.client.head_object(Bucket=bucket, Key=key)))

    def open(self, path: str, head: int | None = None) -> Reader:
        return _Reader(self, path, head)

    def get_range(self, path: str, start: int, length: int) -> bytes:
        bucket, key = split_path(path)
        wanted = f"bytes={start}-{start + length - 1}"

        def request() -> bytes:
            try:
                found = self.client.get_object(Bucket=bucket, Key=key, Range=wanted)
            except Exception as e:
                if self._answer(e)[0] != 416:
                    raise
                return b""  # the object ends before the first of them
            data: bytes = found["Body"].read()
            return data

        return self.attempt(path, request)

    def put(self, path: str, data: bytes, version: str | None = None) -> None:
        bucket, key = split_path(path)
        condition = {} if version is None else {"IfMatch": version} if version else {"IfNoneMatch": "*"}

        def request() -> None:
            try:
                self.client.put_object(Bucket=bucket, Key=key, Body=data, **condition)
            except Exception as e:
                if not condition or self._answer(e)[0] != 501:
                    raise
                # A store of another make, which does not know conditions.
                self.client.put_object(Bucket=bucket, Key=key, Body=data)

        self.attempt(path, request)

    def get_version(self, path: str, size: int) -> tuple[bytes, str]:
        with _Reader(self, path, size) as reader:
            return reader.readall(), reader.etag

    def begin(self, path: str) -> Pieces:
        return _Pieces(self, path)

    def copy(self, source: str, target: str) -> None:
        (from_bucket, from_key), (bucket, key) = split_path(source), split_path(target)
        origin = {"Bucket": from_bucket, "Key": from_key}

        def request() -> None:
            try:
                self.client.copy_object(CopySource=origin, Bucket=bucket, Key=key)
            except Exception as e:
                if self._answer(e) not in _TOO_LARGE_TO_COPY:
                    raise
                self.client.copy(origin, bucket, key)  # in pieces

        self.attempt(source, request)

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            bucket, key = split_path(path)
            self.attempt(path, functools.partial(self.client.delete_object, Bucket=bucket, Key=key))

    def find(self, prefix: str, *, deep: bool = False, limit: int | None = None) -> Listing:
        bucket, key = split_path(prefix)
        where = {"Bucket": bucket, "Prefix": key} | ({} if deep else {"Delimiter": "/"})
        paging = {"MaxItems": limit, "PageSize": limit} if limit else {}

        def request() -> Listing:
            pages = self.client.get_paginator("list_objects_v2").paginate(**where, PaginationConfig=paging)
            objects, folders = list[str](), list[str]()
            for page in pages:
                objects += (f"s3://{bucket}/{found['Key']}" for found in page.get("Contents", ()))
                folders += (f"s3://{bucket}/{found['Prefix']}" for found in page.get("CommonPrefixes", ()))
            return objects, folders

        return self.attempt(prefix, request)


def _flags(options: Any) -> dict[str, Any]:
    """What Beam's flags make of the client."""
    if options is None:
        return {}
    from apache_beam.options.pipeline_options import S3Options

    s3 = options.view_as(S3Options)
    return {
        "endpoint_url": s3.s3_endpoint_url,
        "region_name": s3.s3_region_name,
        "aws_access_key_id": s3.s3_access_key_id,
        "aws_secret_access_key": s3.s3_secret_access_key,
        "aws_session_token": s3.s3_session_token,
        "api_version": s3.s3_api_version,
        "use_ssl": not s3.s3_disable_ssl,
        "verify": s3.s3_verify,
    }


def _stat(found: Mapping[str, Any]) -> Stat:
    return Stat(found["ContentLength"], found["LastModified"].timestamp(), found["ETag"].strip('"'))


class _Reader(Reader):
    """One GET, from the position to the end of the object; another one after a seek or a broken one."""

    def __init__(self, store: S3, path: str, head: int | None = None) -> None:
        super().__init__(store, path)
        self._client = store.client
        self._body: Any = None
        self._body_position = 0
        self._end = head
        self.etag = ""
        store.attempt(path, self._request)

    def _request(self) -> None:
        bucket, key = split_path(self._path)
        start, condition = self._position, {"IfMatch": self.etag} if self.etag else {}
        if start or self._end:
            condition["Range"] = f"bytes={start}-{self._end - 1 if self._end else ''}"
        try:
            found = self._client.get_object(Bucket=bucket, Key=key, **condition)
        except Exception as e:
            if self._store._answer(e)[0] != 416:
                raise
            found = self._client.get_object(Bucket=bucket, Key=key)  # an empty object has no first byte
        self._body, self._body_position = found["Body"], start
        if not self.etag:
            self.etag, self.stat, self.size = found["ETag"], _stat(found), found["ContentLength"]

    def _at_position(self) -> Any:
        if self._body is None or self._body_position != self._position:
            self._drop()
            self._request()
        return self._body

    def _read_some(self, view: memoryview) -> int:
        from botocore.exceptions import IncompleteReadError

        with self._dropping():
            count: int = self._at_position().readinto(view)
            if not count:
                raise IncompleteReadError(actual_bytes=self._position, expected_bytes=self.size)
        self._body_position += count
        return count

    def _read_rest(self) -> bytes:
        with self._dropping():
            data: bytes = self._at_position().read()  # checks the length, and the checksum if there is one
        self._body_position += len(data)
        return data

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        """Drop the connection if the block fails."""
        try:
            yield
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            body.close()

    def close(self) -> None:
        """Close; the connection is used again if all was read."""
        if self._body is not None and self._body_position == self.size:
            with contextlib.suppress(Exception):
                self._body.read()  # only at its end does a body give its connection back
        self._drop()
        super().close()


class _Pieces(Pieces):
    _MARK: Final = "beam-nifti-upload"

    def __init__(self, store: S3, path: str) -> None:
        self._store, self._client, self._path = store, store.client, path
        self._bucket, self._key = split_path(path)
        self._mark = uuid.uuid4().hex
        begun = store.attempt(
            path,
            lambda: self._client.create_multipart_upload(
                Bucket=self._bucket, Key=self._key, Metadata={self._MARK: self._mark}
            ),
        )
        self._upload = {"Bucket": self._bucket, "Key": self._key, "UploadId": begun["UploadId"]}
        self._parts: list[dict[str, Any]] = []

    def add(self, data: bytes) -> None:
        number = len(self._parts) + 1
        sent = self._store.attempt(
            self._path, lambda: self._client.upload_part(**self._upload, PartNumber=number, Body=data)
        )
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"]})

    def finish(self) -> None:
        self._store.attempt(self._path, self._complete)

    def _complete(self) -> None:
        try:
            self._client.complete_multipart_upload(**self._upload, MultipartUpload={"Parts": self._parts})
        except self._client.exceptions.ClientError as e:
            if self._store._answer(e)[1] != "NoSuchUpload" or not self._is_there():
                raise

    def _is_there(self) -> bool:
        """Whether the object is already this upload: an earlier attempt worked, but its answer was lost."""
        found = self._client.head_object(Bucket=self._bucket, Key=self._key)
        return bool(found["Metadata"].get(self._MARK) == self._mark)

    def abort(self) -> None:
        self._store.attempt(self._path, lambda: self._client.abort_multipart_upload(**self._upload))
