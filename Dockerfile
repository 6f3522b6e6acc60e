# Beam's SDK image with this package in the versions of constraints.txt, and without TensorFlow, which
# only the reader needs. One image for workers of every engine, for the command line, and for the
# launcher of a Dataflow Flex Template: docs/image.md.
#
#   docker build -t beam-nifti:0.1.0 .
#
# Beam and Python must have the versions of the environment that launches a job.
ARG BASE=apache/beam_python3.11_sdk:2.77.0
FROM ${BASE}

# Extras of the package; aws is the access to s3://, while gs:// comes with the base image.
ARG EXTRAS=aws

# Workers run in this image's own Python instead of a new virtual environment: half the start.
ENV RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1

COPY LICENSE README.md constraints.txt pyproject.toml setup.py /opt/beam_nifti/
COPY beam_nifti /opt/beam_nifti/beam_nifti
RUN pip install --no-cache-dir -c /opt/beam_nifti/constraints.txt "/opt/beam_nifti[${EXTRAS}]" \
    && python -c "import beam_nifti.transforms" \
    && useradd --create-home --uid 1000 beam

# What the launcher of a Flex Template starts; nothing else looks at it.
COPY pipelines/flex_template/launch.py /opt/beam_nifti/flex_template/launch.py
ENV FLEX_TEMPLATE_PYTHON_PY_FILE=/opt/beam_nifti/flex_template/launch.py

# Beam's launcher writes a file where it stands, and every user may do so here.
WORKDIR /tmp

# Dataflow mounts a folder of the worker's host into the container, which nobody promises to another
# user than root. Where Beam starts the container on your own machines, or you do: USER=beam.
ARG USER=root
USER ${USER}
