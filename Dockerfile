# threetowers on a CPU, built from the registries of Docker and of Python alone; docs/howto/container.md has the commands.
FROM python:3.12-slim

# The dependencies are a layer of their own. As long as pyproject.toml stays as it is, PyTorch is not installed again.
WORKDIR /build
COPY pyproject.toml ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*project['dependencies'], *project['optional-dependencies']['explore'], sep='\n')" > requirements.txt \
    && pip install --no-cache-dir --requirement requirements.txt

COPY README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir --no-deps ".[explore]"

# Runs are written below /work, by this user or by the one that `docker run --user` names.
RUN useradd --uid 1000 --no-create-home threetowers && mkdir -m 1777 /work
ENV HOME=/work USER=threetowers MPLCONFIGDIR=/tmp/matplotlib
USER threetowers
WORKDIR /work

ENTRYPOINT ["threetowers"]
CMD ["demo"]
