# The workers' container: Beam's SDK image, this package, the versions of constraints.txt, and no
# TensorFlow, which only the reader needs.
#
#   docker build -t beam-nifti:0.1.0 .
#   beam-nifti build MANIFEST OUTPUT --runner=... --sdk_container_image=beam-nifti:0.1.0
#
# The Beam version and the Python version must be those of the environment that launches the job.
ARG BEAM_VERSION=2.77.0
ARG PYTHON_VERSION=3.11
FROM apache/beam_python${PYTHON_VERSION}_sdk:${BEAM_VERSION}

# Extras of the package to install; aws is the access to s3://, gs:// comes with the base image.
ARG EXTRAS=aws

# Workers run in this image's own Python instead of a new virtual environment: half the start.
ENV RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1

COPY LICENSE README.md constraints.txt pyproject.toml setup.py /opt/beam_nifti/
COPY beam_nifti /opt/beam_nifti/beam_nifti
RUN pip install --no-cache-dir -c /opt/beam_nifti/constraints.txt "/opt/beam_nifti[${EXTRAS}]" \
    && python -c "import beam_nifti.transforms"
