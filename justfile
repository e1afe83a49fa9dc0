# Everything CI runs
check:
    .ci/run

# Accept changed snapshots and versions, after reading them
bless:
    INSTA_UPDATE=always PIPE_BLESS=1 cargo test --workspace --locked

# The long counts of the randomised tests
soak:
    PROPTEST_CASES=20000 PIPE_SOAK=200 cargo test --release --workspace --locked
