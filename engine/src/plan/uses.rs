//! Which parameters of the pipeline stand within a longer text of a step, so that what changed there
//! can be traced to where the parameter got its value.

use serde::{Deserialize, Serialize};

use super::Place;
use crate::interpolate::{Piece, pieces};
use crate::spec::scope::Scope;
use crate::spec::source::Sources;
use crate::spec::yaml::{Node, Value};

/// A parameter within a text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Use {
    /// The step's parameter that the text is of: `run`.
    pub parameter: String,
    /// What stands in it: `params.word`.
    pub name: String,
    /// As what it stands there.
    pub value: String,
    /// Where the value was written.
    pub place: Place,
}

/// The parameters in the texts of `node`, which is the step's `parameter`; each once.
pub(super) fn uses(parameter: &str, node: &Node, scope: &Scope<'_>, sources: &Sources) -> Vec<Use> {
    let mut texts = Vec::new();
    gather(node, &mut texts);
    let mut found: Vec<Use> = Vec::new();
    for text in texts {
        for piece in pieces(text).unwrap_or_default() {
            let Piece::Hole { name, .. } = piece else { continue };
            let value = name.strip_prefix("params.").and_then(|path| {
                path.split('.').try_fold(scope.params?, |node, name| node.get(name))
            });
            let Some((value, text)) = value.and_then(|node| Some((node, node.text()?))) else {
                continue;
            };
            if found.iter().all(|one| one.name != name) {
                found.push(Use {
                    parameter: parameter.into(),
                    name: name.into(),
                    value: text.into(),
                    place: sources.place(value.span),
                });
            }
        }
    }
    found
}

fn gather<'a>(node: &'a Node, texts: &mut Vec<&'a str>) {
    match &node.value {
        Value::Scalar { text, .. } => texts.push(text),
        Value::Seq(items) => items.iter().for_each(|item| gather(item, texts)),
        Value::Map(entries) => entries.iter().for_each(|(_, node)| gather(node, texts)),
        _ => {}
    }
}
