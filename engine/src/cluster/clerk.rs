//! The one thread that talks to the batch system, since its commands may take a minute: what is
//! asked comes in, what was answered goes to the driver.

use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use super::batch::{Array, Batch, Cancel, Refusal, Status};

/// What the batch system is asked.
pub(super) enum Ask {
    Submit(Array),
    Poll(Vec<String>),
    Cancel(Vec<String>, Cancel),
}

/// What it answered.
pub(super) enum Said {
    Submitted { name: String, result: Result<String, Refusal> },
    Polled { names: Vec<String>, asked: Instant, result: Result<Vec<Status>, String> },
    Cancelled { ids: Vec<String>, how: Cancel, well: bool },
}

/// Starts the clerk; it ends when nobody asks any more.
pub(super) fn start<T: From<Said> + Send + 'static>(
    mut batch: Box<dyn Batch>,
    tell: Sender<T>,
) -> Sender<Ask> {
    let (sender, asked) = channel();
    std::thread::spawn(move || {
        for ask in asked {
            let said = match ask {
                Ask::Submit(array) => {
                    let result = batch.submit(&array);
                    Said::Submitted { name: array.name, result }
                }
                Ask::Poll(names) => {
                    let asked = Instant::now();
                    let result = batch.poll(&names);
                    Said::Polled { names, asked, result }
                }
                Ask::Cancel(ids, how) => {
                    let well = batch.cancel(&ids, how).is_ok();
                    Said::Cancelled { ids, how, well }
                }
            };
            if tell.send(said.into()).is_err() {
                return;
            }
        }
    });
    sender
}
