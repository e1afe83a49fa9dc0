//! The GPU of `pipe bench decode`, in builds that can have one.

use anyhow::{Result, bail};
use stages::models::{Model, Params};

use super::super::super::Wrong;
use super::Cost;
use crate::cli::BenchDecode;

/// What a token of every text moves.
pub struct Moved {
    /// Of the device, for one token of every text.
    pub milliseconds: f64,
    /// Bytes of weights.
    pub weights: u64,
    /// 10⁹ bytes a second: weights, keys and values, states there and back.
    pub gb_s: f64,
    /// As a part of what a copy moves.
    pub share: f64,
}

#[cfg(any(feature = "cuda", feature = "emulate"))]
pub use with_gpu::{Device, made_up};

#[cfg(any(feature = "cuda", feature = "emulate"))]
mod with_gpu {
    use anyhow::Context as _;
    use stages::gpu::bench::subject::Subject;
    use stages::gpu::decode;
    use stages::gpu::fault::OutOfDeviceMemory;
    use stages::gpu::launch::Gpu;

    use super::{BenchDecode, Cost, Model, Moved, Params, Result, Wrong, bail};

    /// Bytes of the copy that others are compared with; less on an emulator.
    const COPY: usize = if cfg!(feature = "cuda") { 1 << 30 } else { 1 << 20 };

    /// An open GPU.
    pub struct Device {
        gpu: Gpu,
        copy: f64,
    }

    impl Device {
        /// The GPU that `args` ask for, or `None` for the CPU.
        pub fn open(args: &BenchDecode) -> Result<Option<Device>> {
            let there = match cfg!(feature = "cuda") {
                true => stages::gpu::devices().map(drop),
                // An emulator is not what anybody wants who does not say so.
                false if args.device == "cuda" => Ok(()),
                false => Err("this build has an emulator only".into()),
            };
            match (args.device.as_str(), there) {
                ("cpu", _) | ("auto", Err(_)) => return Ok(None),
                (_, Err(why)) => bail!(Wrong(format!("there is no GPU to decode on: {why}"))),
                _ => {}
            }
            let gpu = stages::gpu::open()?;
            let copy = decode::copy_bandwidth(&gpu, COPY)?;
            Ok(Some(Device { gpu, copy }))
        }

        /// What it is called.
        pub fn name(&self) -> String {
            self.gpu.name()
        }

        /// What a copy moves, in 10⁹ bytes a second.
        pub fn copy_gb_s(&self) -> f64 {
            self.copy / 1e9
        }

        /// What a token costs after `context`; inside, why it was left out.
        pub fn measure(
            &self,
            args: &BenchDecode,
            model: &Model,
            params: &Params,
            context: usize,
        ) -> Result<Result<Cost, String>> {
            let (batch, tokens) = (args.batch as usize, args.tokens as usize);
            let [caches, states] = decode::bytes_of(&model.config, batch, context);
            let (need, free) = (caches.saturating_add(states), self.gpu.memory()?.0);
            if need > free {
                let [need, free] = [need, free].map(|size| crate::out::bytes(size as u64));
                return Ok(Err(format!("its state needs {need}, and {free} are free")));
            }
            let context = (context, args.read);
            let found = decode::measure(&self.gpu, model, &params.flat, batch, context, tokens);
            let speed = match found {
                Ok(speed) => speed,
                Err(error) if error.is::<OutOfDeviceMemory>() => {
                    return Ok(Err(format!("{error:#}")));
                }
                Err(error) => return Err(error),
            };
            let moved = Moved {
                milliseconds: speed.milliseconds,
                weights: speed.weights as u64,
                gb_s: speed.bandwidth() / 1e9,
                share: speed.bandwidth() / self.copy,
            };
            let state = speed.remembered as u64;
            let moved = Some(moved);
            Ok(Ok(Cost { rate: speed.rate, state, resident: None, anonymous: None, moved }))
        }
    }

    /// A teacher of the sizes called `name`, or its student, with fresh weights.
    pub fn made_up(name: &str, student: bool) -> Result<(Model, Params)> {
        let subject = Subject::named(name).context("there is no such model")?;
        let config = if student { subject.student() } else { subject.teacher };
        let model = Model::new(config)?;
        let params = model.init(0);
        Ok((model, params))
    }
}

#[cfg(not(any(feature = "cuda", feature = "emulate")))]
pub use without_gpu::{Device, made_up};

#[cfg(not(any(feature = "cuda", feature = "emulate")))]
mod without_gpu {
    use super::{BenchDecode, Cost, Model, Params, Result, Wrong, bail};

    const NONE: &str = "this build has no CUDA: build it with `--features cuda`";

    /// There is none.
    pub enum Device {}

    impl Device {
        /// Only the CPU.
        pub fn open(args: &BenchDecode) -> Result<Option<Device>> {
            match args.device.as_str() {
                "cuda" => bail!(Wrong(format!("there is no GPU to decode on: {NONE}"))),
                _ => Ok(None),
            }
        }

        /// Of no device.
        pub fn name(&self) -> String {
            match *self {}
        }

        /// Of no device.
        pub fn copy_gb_s(&self) -> f64 {
            match *self {}
        }

        /// Of no device.
        pub fn measure(
            &self,
            _: &BenchDecode,
            _: &Model,
            _: &Params,
            _: usize,
        ) -> Result<Result<Cost, String>> {
            match *self {}
        }
    }

    /// Sizes with made-up weights are the business of builds that measure GPUs.
    pub fn made_up(_: &str, _: bool) -> Result<(Model, Params)> {
        bail!(Wrong(NONE.into()))
    }
}
