# An image of this checkout: docker build --build-arg EXTRA=tpu --tag REGISTRY/chinchilla:1.0 .
#
#   EXTRA   tpu (default), cuda, or cpu
#
# Runs as a user without rights; secrets come when it runs (docs/launch.md), never in here.
FROM python:3.12-slim-bookworm

ARG EXTRA=tpu

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

RUN useradd --uid 1000 --create-home --shell /usr/sbin/nologin chinchilla

# --config=configs/... is read from here.
WORKDIR /opt/chinchilla

# Packages first, from setup.py alone: they change seldom, and are most of the image.
COPY setup.py pyproject.toml README.md LICENSE ./
COPY chinchilla_jax/__init__.py chinchilla_jax/__init__.py
RUN case "$EXTRA" in tpu|cuda) extras="[$EXTRA,gcs,s3]" ;; cpu) extras="[gcs,s3]" ;; \
      *) echo "EXTRA is '$EXTRA'; give tpu, cuda or cpu" >&2; exit 2 ;; esac \
    && pip install --editable ".$extras"

COPY chinchilla_jax chinchilla_jax
COPY configs configs

# A run, its store and its caches lie on a volume; what is here only has to be readable.
USER 1000:1000

# In this form signals reach Python, and its exit status is that of the container.
ENTRYPOINT ["chinchilla"]
CMD ["--help"]
