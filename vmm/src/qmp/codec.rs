// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Bytes to JSON values and back.
//!
//! Values follow one another with or without white space between them, over any number of lines. What cannot
//! be a value costs one error, with QEMU's text for it, and the stream goes on behind it. Memory is bounded:
//! a value that grows beyond [`MAX_VALUE`] is dropped up to the end of its line.

use serde::Serialize;
use serde_json::Value;

use super::request::QmpError;

/// Most bytes of one value.
const MAX_VALUE: usize = 1 << 20;
/// Most objects and arrays inside one another; `serde_json` refuses more than 127.
const MAX_DEPTH: usize = 100;

/// Where the scan stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Between values.
    Start,
    /// In a number or a keyword that is a value of its own.
    Word,
    /// In an object or an array, outside strings.
    Nest,
    /// In a string.
    String,
    /// In a string behind a backslash.
    Escape,
    /// Dropping what is left of a line.
    Skip,
}

/// What the scan found.
enum Cut {
    /// A value ends here.
    Value,
    /// What came so far cannot become a value.
    Error(String),
}

/// Cuts a stream of bytes into JSON values.
#[derive(Debug)]
pub(super) struct Decoder {
    input: Vec<u8>,
    /// Where in `input` the next value begins.
    begin: usize,
    /// Up to where the scan has seen `input`.
    scanned: usize,
    state: State,
    depth: usize,
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self { input: Vec::new(), begin: 0, scanned: 0, state: State::Start, depth: 0 }
    }

    /// Take more bytes of the stream.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        self.input.drain(..self.begin);
        self.scanned -= self.begin;
        self.begin = 0;
        if self.input.is_empty() {
            // Do not keep room for the largest value that this client ever sent.
            self.input.shrink_to(bytes.len());
        }
        self.input.extend_from_slice(bytes);
    }

    /// The next value, or why there is none where one should be; `None` until more bytes come.
    pub(super) fn next(&mut self) -> Option<Result<Value, QmpError>> {
        while let Some(&byte) = self.input.get(self.scanned) {
            self.scanned += 1;
            let cut = match self.step(byte) {
                None if self.scanned - self.begin > MAX_VALUE => {
                    self.state = State::Skip;
                    Cut::Error("JSON token size limit exceeded".into())
                }
                None => continue,
                Some(cut) => cut,
            };
            let text = self.input.get(self.begin..self.scanned).unwrap_or_default();
            let value = match cut {
                Cut::Value => parse(text),
                Cut::Error(reason) => Err(QmpError::generic(reason)),
            };
            self.begin = self.scanned;
            self.depth = 0;
            return Some(value);
        }
        None
    }

    /// Whether nothing of a next value has come yet.
    pub(super) fn is_between_values(&self) -> bool {
        self.state == State::Start && self.begin == self.input.len()
    }

    /// Look at one byte, which is already counted as seen.
    fn step(&mut self, byte: u8) -> Option<Cut> {
        // These two are in no UTF-8 text; clients send them to get rid of what is pending.
        if matches!(byte, 0xFE | 0xFF) {
            self.state = State::Start;
            return Some(Cut::Error(stray("\u{FFFD}")));
        }
        match self.state {
            State::Start => self.start(byte),
            State::Word if is_word(byte) => None,
            State::Word => {
                // The byte belongs to what follows.
                self.scanned -= 1;
                self.state = State::Start;
                Some(Cut::Value)
            }
            State::Nest => self.nest(byte),
            State::String | State::Escape if byte < 0x20 => {
                self.state = State::Start;
                Some(Cut::Error(stray(&String::from(char::from(byte)))))
            }
            State::Escape => {
                self.state = State::String;
                None
            }
            State::String => match byte {
                b'\\' => {
                    self.state = State::Escape;
                    None
                }
                b'"' => self.end_of_token(),
                _ => None,
            },
            State::Skip => {
                self.begin = self.scanned;
                if byte == b'\n' {
                    self.state = State::Start;
                }
                None
            }
        }
    }

    fn start(&mut self, byte: u8) -> Option<Cut> {
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => {
                self.begin = self.scanned;
                None
            }
            b'{' | b'[' => {
                self.depth = 1;
                self.state = State::Nest;
                None
            }
            b'"' => {
                self.state = State::String;
                None
            }
            _ if is_word(byte) => {
                self.state = State::Word;
                None
            }
            // No value begins like this: the parser says what is wrong.
            _ => Some(Cut::Value),
        }
    }

    fn nest(&mut self, byte: u8) -> Option<Cut> {
        match byte {
            b'"' => self.state = State::String,
            b'{' | b'[' if self.depth == MAX_DEPTH => {
                self.state = State::Skip;
                return Some(Cut::Error("JSON nesting depth limit exceeded".into()));
            }
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth -= 1;
                return self.end_of_token();
            }
            _ => {}
        }
        None
    }

    /// A string, object or array has ended.
    fn end_of_token(&mut self) -> Option<Cut> {
        if self.depth > 0 {
            self.state = State::Nest;
            return None;
        }
        self.state = State::Start;
        Some(Cut::Value)
    }
}

/// Whether a byte may be part of a number or a keyword.
fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'.' | b'_')
}

fn stray(text: &str) -> String {
    format!("JSON parse error, stray '{text}'")
}

fn parse(text: &[u8]) -> Result<Value, QmpError> {
    serde_json::from_slice(text)
        .map_err(|error| QmpError::generic(format!("JSON parse error, {}", explain(text, &error))))
}

/// What is wrong, in QEMU's words. `serde_json` tells its reasons only as text; one that is not known here
/// is passed on as it is.
fn explain(text: &[u8], error: &serde_json::Error) -> String {
    let reason = error.to_string();
    let reason = reason.split(" at line").next().unwrap_or_default();
    match reason {
        "invalid escape" => return "invalid escape sequence in string".into(),
        "lone leading surrogate in hex escape" | "unexpected end of hex escape" => {
            return "invalid hex escape sequence in string".into();
        }
        "invalid unicode code point" => return "invalid UTF-8 sequence in string".into(),
        _ => {}
    }
    let at = offset(text, error);
    let byte = text.get(at).copied();
    if byte.is_some_and(|byte| byte.is_ascii_alphabetic()) || reason == "expected ident" {
        return format!("invalid keyword '{}'", word(text, at));
    }
    if byte.is_some_and(|byte| !b"{}[]:,\" \t\r\n".contains(&byte) && !is_word(byte)) {
        let text = String::from_utf8_lossy(text.get(at..).unwrap_or_default());
        return format!("stray '{}'", text.chars().next().unwrap_or_default());
    }
    match reason {
        "expected `:`" => "missing : in object pair",
        "expected `,` or `]`" => "expected separator in list",
        "expected `,` or `}`" => "expected separator in dict",
        "key must be a string" if byte != Some(b',') => "key is not a string in object",
        "expected value" | "key must be a string" | "trailing comma" => "expecting value",
        "EOF while parsing an object" | "EOF while parsing a list" => "expecting value",
        other => other,
    }
    .into()
}

/// Where in `text` the parser stopped; `serde_json` counts lines and columns from 1.
fn offset(text: &[u8], error: &serde_json::Error) -> usize {
    let line_start = text
        .split_inclusive(|&byte| byte == b'\n')
        .take(error.line().saturating_sub(1))
        .map(<[u8]>::len)
        .sum::<usize>();
    line_start + error.column().saturating_sub(1)
}

/// The keyword around `at`.
fn word(text: &[u8], at: usize) -> String {
    let (before, after) = text.split_at(at.min(text.len()));
    let letters = |byte: &&u8| byte.is_ascii_alphabetic();
    let start = at - before.iter().rev().take_while(letters).count();
    let end = at + after.iter().take_while(letters).count();
    String::from_utf8_lossy(text.get(start..end).unwrap_or_default()).into_owned()
}

/// Append a message as one line, ended as QEMU ends it.
pub(super) fn write_line(output: &mut Vec<u8>, message: &impl Serialize) {
    // Writing to memory does not fail, and no message has a map with keys other than strings.
    if let Err(error) = serde_json::to_writer(&mut *output, message) {
        log::error!("encode a QMP message: {error}");
    }
    output.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// All that comes out of a stream that arrives in pieces of `step` bytes.
    fn decode(bytes: &[u8], step: usize) -> Vec<Result<Value, String>> {
        let mut decoder = Decoder::new();
        let mut out = Vec::new();
        for piece in bytes.chunks(step) {
            decoder.feed(piece);
            out.extend(std::iter::from_fn(|| decoder.next()).map(|one| one.map_err(|e| e.desc)));
        }
        out
    }

    fn values(text: &str) -> Vec<Value> {
        decode(text.as_bytes(), 7).into_iter().map(Result::unwrap).collect()
    }

    /// The one error of `bytes`, behind which the stream goes on.
    fn error(bytes: &[u8]) -> String {
        let mut stream = bytes.to_vec();
        stream.extend_from_slice(b"\n{\"then\":1}");
        let mut out = decode(&stream, stream.len());
        assert_eq!(out.pop(), Some(Ok(json!({"then": 1}))), "{}", bytes.escape_ascii());
        assert_eq!(out.len(), 1, "{}: {out:?}", bytes.escape_ascii());
        out.remove(0).unwrap_err()
    }

    #[test]
    fn cuts_where_values_end_and_not_where_lines_do() {
        assert_eq!(values("{}{}"), [json!({}), json!({})]);
        assert_eq!(values(" {\n\"a\"\r\n:\t[1,{}]\n}\n\n{}"), [json!({"a": [1, {}]}), json!({})]);
        assert_eq!(values(r#"{"a":"}]\"{"}"#), [json!({"a": "}]\"{"})]);
        assert_eq!(values(r#""x"[]5 null "#), [json!("x"), json!([]), json!(5), json!(null)]);
    }

    #[test]
    fn waits_for_the_rest_of_a_value() {
        let mut decoder = Decoder::new();
        for piece in ["{\"execute\"", ":", "\"st", "op\""] {
            decoder.feed(piece.as_bytes());
            assert!(decoder.next().is_none(), "{piece}");
        }
        decoder.feed(b"}");
        assert_eq!(decoder.next().unwrap().unwrap(), json!({"execute": "stop"}));
    }

    /// The texts were recorded from QEMU 7.2 and 10.0.
    #[test]
    fn says_what_is_wrong_in_qemus_words() {
        for (input, text) in [
            ("{bad json}", "invalid keyword 'bad'"),
            ("garbage", "invalid keyword 'garbage'"),
            ("]", "expecting value"),
            ("[}", "expecting value"),
            ("[1,]", "expecting value"),
            (r#"{"a":1,}"#, "expecting value"),
            (r#"{"execute":}"#, "expecting value"),
            ("{,}", "expecting value"),
            (r#"{"execute" "x"}"#, "missing : in object pair"),
            ("[1 2]", "expected separator in list"),
            (r#"{"a":1 "b":2}"#, "expected separator in dict"),
            ("{1:2}", "key is not a string in object"),
            (r#"{"a":"\q"}"#, "invalid escape sequence in string"),
            ("@", "stray '@'"),
            ("\u{1}", "stray '\u{1}'"),
            ("\0", "stray '\0'"),
            ("[nul]", "invalid keyword 'nul'"),
        ] {
            assert_eq!(error(input.as_bytes()), format!("JSON parse error, {text}"), "{input}");
        }
    }

    #[test]
    fn a_line_feed_ends_a_string_that_was_not_closed() {
        let out = decode(b"{\"execute\":\"sto\n{\"execute\":\"stop\"}", 64);
        assert_eq!(out[0], Err("JSON parse error, stray '\n'".into()));
        assert_eq!(out[1], Ok(json!({"execute": "stop"})));
    }

    #[test]
    fn bytes_that_no_text_has_get_rid_of_what_is_pending() {
        let out = decode(b"{\"half\":[\xff{\"execute\":\"stop\"}", 64);
        assert_eq!(out, [Err(stray("\u{FFFD}")), Ok(json!({"execute": "stop"}))]);
    }

    #[test]
    fn invalid_utf8_is_one_error() {
        assert_eq!(
            error(b"{\"a\":\"\xc3(\"}"),
            "JSON parse error, invalid UTF-8 sequence in string"
        );
        assert_eq!(error(b"\xc2"), "JSON parse error, stray '\u{FFFD}'");
    }

    #[test]
    fn a_value_without_end_costs_one_error_and_bounded_memory() {
        let mut decoder = Decoder::new();
        let mut errors = Vec::new();
        decoder.feed(b"{\"execute\":\"");
        for _ in 0..640 {
            decoder.feed(&[b'a'; 16 << 10]);
            errors.extend(std::iter::from_fn(|| decoder.next()));
            assert!(decoder.input.capacity() < 4 * MAX_VALUE, "{}", decoder.input.capacity());
        }
        assert_eq!(errors, [Err(QmpError::generic("JSON token size limit exceeded"))]);
        decoder.feed(b"\"}\n{\"execute\":\"stop\"}");
        assert_eq!(decoder.next(), Some(Ok(json!({"execute": "stop"}))));
        decoder.feed(b" ");
        assert!(decoder.input.capacity() < 1024, "{}", decoder.input.capacity());
    }

    #[test]
    fn depth_is_limited() {
        let nest = |depth| ["[".repeat(depth), "]".repeat(depth)].concat();
        assert_eq!(values(&nest(MAX_DEPTH)).len(), 1);
        assert_eq!(error(nest(MAX_DEPTH + 1).as_bytes()), "JSON nesting depth limit exceeded");
        assert_eq!(error("[".repeat(100_000).as_bytes()), "JSON nesting depth limit exceeded");
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(any::<String>(), inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back_however_it_is_split(
            sent in prop::collection::vec(any_json(), 0..5),
            step in 1usize..40,
        ) {
            let mut stream = Vec::new();
            for value in &sent {
                write_line(&mut stream, value);
            }
            let out: Vec<Value> =
                decode(&stream, step).into_iter().map(Result::unwrap).collect();
            prop_assert_eq!(out, sent);
        }

        #[test]
        fn any_bytes_come_out_the_same_however_they_are_split(
            bytes in prop::collection::vec(
                prop_oneof![any::<u8>(), prop::sample::select(&b"{}[]\":,\\ \n\xff1a"[..])],
                0..200,
            ),
            step in 1usize..40,
        ) {
            prop_assert_eq!(decode(&bytes, step), decode(&bytes, bytes.len().max(1)));
        }
    }
}
