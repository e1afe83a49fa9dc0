//! Where an exported model comes from: `provenance.json` for programs, a model card for people.
//! Knows the words, not how they were found.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::directory::MADE_BY;
use super::{Format, PROVENANCE};

/// Lines of one table of the card.
const MOST_ROWS: usize = 200;

/// All that is told of a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Provenance {
    /// [`MADE_BY`]: by it a directory of ours is known.
    pub made_by: String,
    /// Version of the program.
    pub build: String,
    /// Name of the pipeline.
    pub pipeline: String,
    /// The exported step.
    pub step: String,
    /// Its output port.
    pub port: String,
    /// Its key.
    pub key: String,
    /// Digest of the model artifact.
    pub model: String,
    /// The format of `config.json`.
    pub format: String,
    /// Number of parameters.
    pub parameters: usize,
    /// Element type of the weights, in torch's words.
    pub dtype: String,
    /// See [`super::Described::notes`].
    pub notes: Vec<String>,
    /// The step and all before it, in the order of the pipeline.
    pub steps: Vec<StepFact>,
    /// Steps that measured this model.
    pub evaluations: Evaluations,
    /// All files of the directory: nothing else is ever replaced.
    pub files: Vec<String>,
}

/// One step that the model depends on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StepFact {
    /// Its name.
    pub name: String,
    /// Its stage.
    pub stage: String,
    /// The version of the stage.
    pub version: u32,
    /// Its key.
    pub key: String,
    /// Its parameters.
    pub params: Value,
}

/// Steps that measured the model.
pub type Evaluations = Vec<Evaluation>;

/// What a step measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Evaluation {
    /// Its name.
    pub step: String,
    /// Its key.
    pub key: String,
    /// Its metrics.
    pub metrics: Value,
}

impl Provenance {
    /// Fills in what is known when the files are.
    pub fn complete(
        &mut self,
        format: Format,
        parameters: usize,
        dtype: &str,
        notes: &[String],
        mut files: Vec<String>,
    ) {
        files.extend(["README.md".to_string(), PROVENANCE.to_string()]);
        files.sort();
        self.made_by = MADE_BY.into();
        self.format = format.name().into();
        self.parameters = parameters;
        self.dtype = dtype.into();
        self.notes = notes.to_vec();
        self.files = files;
    }

    /// Whether `text` is the `provenance.json` of a directory of ours; then the names of its files.
    pub fn files_of(text: &str) -> Option<Vec<String>> {
        let found: Provenance = serde_json::from_str(text).ok()?;
        (found.made_by == MADE_BY).then_some(found.files)
    }

    /// The text of `README.md`.
    pub fn card(&self) -> String {
        let mut card = String::new();
        let name = escape(&format!("{} of {}", self.step, self.pipeline));
        let _ = write!(
            card,
            "---\nlicense: other\nlicense_name: as-the-teachers\n{}tags:\n- pipe\n---\n\n# {name}\n\n\
             A model of {} parameters ({}), in the format of {}, exported by {}. Its weights \
             derive from its teacher's: the licence of the teacher holds for them too.\n",
            if self.is_transformer() { "library_name: transformers\n" } else { "" },
            self.parameters,
            escape(&self.dtype),
            escape(&self.format),
            escape(&self.build),
        );
        self.loading(&mut card);
        if !self.notes.is_empty() {
            card.push_str("\n## Notes\n\n");
            for note in &self.notes {
                let _ = writeln!(card, "- {}", escape(note));
            }
        }
        self.metrics(&mut card);
        self.steps_table(&mut card);
        card
    }

    fn is_transformer(&self) -> bool {
        self.format == Format::Transformers.name()
    }

    fn loading(&self, card: &mut String) {
        let is = |format: Format| self.format == format.name();
        let (what, code) = if self.is_transformer() {
            (
                "With transformers:",
                "from transformers import AutoModelForCausalLM\n\n\
                 model = AutoModelForCausalLM.from_pretrained(\"this-directory\")",
            )
        } else if is(Format::Llamba) {
            (
                "With cartesia-ai/edge (`cartesia-pytorch`):",
                "from cartesia_pytorch.Llamba.llamba import LlambaLMHeadModel\n\n\
                 model = LlambaLMHeadModel.from_pretrained(\"this-directory\", strict=True)",
            )
        } else if is(Format::PhiMamba) || is(Format::HybridPhiMamba) {
            (
                "With goombalab/phi-mamba, in its checkout (it needs transformers 4):",
                "from modules.lm_head import LMHeadModel\n\n\
                 model = LMHeadModel.from_pretrained(\"this-directory\", strict=True)",
            )
        } else {
            let _ = write!(
                card,
                "\n## Loading\n\nNo published class builds this model. Names and `config.json` are \
                 those of Llamba; `pipe` in `config.json` lists the layers with attention, whose \
                 tensors are `mixer.self_attn.*`.\n"
            );
            return;
        };
        let _ = write!(card, "\n## Loading\n\n{what}\n\n```python\n{code}\n```\n");
        card.push_str("\n`pipe` itself takes the directory as a teacher or a student.\n");
    }

    fn metrics(&self, card: &mut String) {
        for evaluation in &self.evaluations {
            let mut rows = Vec::new();
            scalars("", &evaluation.metrics, &mut rows);
            let _ = write!(
                card,
                "\n## Measured by {}\n\nKey {}.\n\n| metric | value |\n|---|---|\n",
                escape(&evaluation.step),
                escape(&evaluation.key)
            );
            for (name, value) in rows.iter().take(MOST_ROWS) {
                let _ = writeln!(card, "| {} | {} |", escape(name), escape(value));
            }
            if rows.len() > MOST_ROWS {
                let _ = writeln!(card, "\n{} more are in `{PROVENANCE}`.", rows.len() - MOST_ROWS);
            }
        }
    }

    fn steps_table(&self, card: &mut String) {
        let _ = write!(
            card,
            "\n## Provenance\n\nStep {} of pipeline {}, port {}; key {}. The same is in `{PROVENANCE}`.\n\n\
             | step | stage | version | parameters | key |\n|---|---|---|---|---|\n",
            escape(&self.step),
            escape(&self.pipeline),
            escape(&self.port),
            escape(&self.key),
        );
        for step in self.steps.iter().take(MOST_ROWS) {
            let _ = writeln!(
                card,
                "| {} | {} | {} | {} | {} |",
                escape(&step.name),
                escape(&step.stage),
                step.version,
                escape(&parameters(&step.params)),
                escape(&step.key),
            );
        }
        if self.steps.len() > MOST_ROWS {
            let _ =
                writeln!(card, "\n{} more are in `{PROVENANCE}`.", self.steps.len() - MOST_ROWS);
        }
    }
}

/// `a = 1, b = "x"`.
fn parameters(params: &Value) -> String {
    let Some(params) = params.as_object() else { return String::new() };
    let all: Vec<String> = params.iter().map(|(name, value)| format!("{name} = {value}")).collect();
    all.join(", ")
}

/// Numbers, texts and truths of nested JSON by dotted name; lists are curves and left out.
fn scalars(name: &str, value: &Value, rows: &mut Vec<(String, String)>) {
    match value {
        Value::Object(map) => {
            for (key, inner) in map {
                let path = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                scalars(&path, inner, rows);
            }
        }
        Value::Array(_) | Value::Null => {}
        Value::String(text) => rows.push((name.into(), text.clone())),
        other => rows.push((name.into(), other.to_string())),
    }
}

/// `text` so that Markdown shows it as it is, on one line, also in a table.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '\\' | '`' | '*' | '_' | '{' | '}' | '[' | ']' | '#' | '|' | '~' | '!' | '$' => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outside_words_cannot_format_the_card() {
        assert_eq!(escape("a|b\n<i>*x*</i>[y](z)"), "a\\|b &lt;i&gt;\\*x\\*&lt;/i&gt;\\[y\\](z)");
        let steps = vec![StepFact {
            name: "a".into(),
            stage: "command".into(),
            params: serde_json::json!({"run": ["sh", "-c", "a | b\n## Title"]}),
            ..StepFact::default()
        }];
        let evil = Evaluation {
            step: "e\n# h".into(),
            metrics: serde_json::json!({"x|y": {"z": 1.5, "curve": [1, 2]}, "t": "<script>"}),
            ..Evaluation::default()
        };
        let provenance = Provenance {
            steps,
            step: "--- | x".into(),
            evaluations: vec![evil],
            format: Format::Llamba.name().into(),
            ..Provenance::default()
        };
        let card = provenance.card();
        assert!(!card.contains("<script>") && !card.contains("\n# h") && !card.contains("\n## T"));
        assert!(card.contains("| x\\|y.z | 1.5 |") && !card.contains("curve"), "{card}");
        let table = card.lines().filter(|line| line.starts_with("| a |"));
        let cells: Vec<usize> =
            table.map(|row| row.replace("\\|", "").matches('|').count()).collect();
        assert_eq!(cells, [6]);
    }

    #[test]
    fn a_directory_of_ours_is_known_by_its_provenance() {
        let mut provenance = Provenance::default();
        let files = vec!["config.json".to_string()];
        provenance.complete(Format::Llamba, 5, "float32", &[], files);
        let text = serde_json::to_string(&provenance).unwrap();
        let files = Provenance::files_of(&text).unwrap();
        assert_eq!(files, ["README.md", "config.json", "provenance.json"]);
        assert_eq!(serde_json::from_str::<Provenance>(&text).unwrap(), provenance);
        assert_eq!(Provenance::files_of(&text.replace("pipe export", "other")), None);
        assert_eq!(Provenance::files_of("{}"), None);
    }
}
