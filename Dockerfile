# To pin the base: --build-arg PYTHON_IMAGE=docker.io/library/python:3.14-slim@sha256:<digest>
ARG PYTHON_IMAGE=docker.io/library/python:3.14-slim

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m venv --without-pip /app && python -m venv --without-pip /build
# requirements-tracing.lock also has the packages for traces.
ARG LOCK=requirements.lock
COPY ${LOCK} requirements-build.lock ./
# Your own package index or certificate authority comes as a secret, which stays out of the image.
RUN --mount=type=secret,id=pip-conf,target=/etc/pip.conf --mount=type=secret,id=ca-bundle \
  pip --python /app/bin/python install --no-compile --only-binary=:all: --require-hashes -r ${LOCK} \
  && pip --python /build/bin/python install --only-binary=:all: --require-hashes -r requirements-build.lock
# Most of the SDK's size is the data of 450 AWS services: keep S3 and those that provide credentials.
RUN find /app/lib/python3*/site-packages/botocore/data -mindepth 1 -maxdepth 1 -type d \
  ! -name s3 ! -name signin ! -name sso ! -name sso-oidc ! -name sts -exec rm -r {} +
COPY LICENSE README.md pyproject.toml ./
COPY worker worker
COPY vqa_worker vqa_worker
# Unchecked hashes: an image may lose the sources' times, with which Python compares compiled files by default.
RUN pip --python /build/bin/python wheel --no-deps --no-build-isolation --wheel-dir /dist . \
  && pip --python /app/bin/python install --no-compile --no-deps --no-index /dist/*.whl \
  && python -m compileall -f -q -j 0 --invalidation-mode unchecked-hash /app

FROM ${PYTHON_IMAGE}
# The base has no compiled files of the standard library, and the read-only container could not write them.
RUN python -m compileall -f -q -j 0 --invalidation-mode unchecked-hash \
  -x '/(ensurepip|idlelib|pydoc_data|site-packages|test|tkinter|turtledemo)/' \
  "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
COPY --from=build /app /app
ENV PATH=/app/bin:${PATH} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /app
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
# No init process: the worker waits for the processes that convert images, and handles SIGTERM as process 1 before
# its imports.
ENTRYPOINT ["vqa-worker"]
CMD ["run"]
# Last, as they change with every commit.
ARG PYTHON_IMAGE
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="vqa-worker" \
  org.opencontainers.image.description="Answers questions about images, from RabbitMQ to RabbitMQ" \
  org.opencontainers.image.licenses="Apache-2.0" \
  org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${REVISION}" \
  org.opencontainers.image.base.name="${PYTHON_IMAGE}"
