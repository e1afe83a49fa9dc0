# Everything CI runs
check:
    .ci/run

# Accept changed snapshots and versions, after reading them
bless:
    INSTA_UPDATE=always PIPE_BLESS=1 cargo test --workspace --locked

# The long counts of the randomised tests, with the crash points that release builds lack; with a
# Slurm to break (an hour) where there is the script that starts one
soak:
    slurm="{{ justfile_directory() }}/../shared/tools/slurm-loopback"; \
        if [ -x "$slurm" ]; then export PIPE_TEST_SLURM="$slurm"; fi; \
        PROPTEST_CASES=20000 PIPE_SOAK=2000 CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true \
        cargo test --release --workspace --locked
