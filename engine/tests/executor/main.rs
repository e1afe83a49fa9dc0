//! The executor with toy stages on threads: no candle, no child process.

mod gpus;
mod random;
mod runs;
mod toys;
