// The table of operations that Python reads when it has loaded the library: engine/kernels/cpu/signatures.py.
//
// What an operation takes is a word for each argument: its name, a colon, and int, float, or torch's name for the
// elements that an address has ("any": another argument says which); a question mark where that may be null.

#include "kernels.h"

typedef struct {
    const char *name, *arguments;
    Operation *body;
} Signature;

#define ELEMENT_void "any"
#define ELEMENT_float "float32"
#define ELEMENT_Half "float16"
#define ELEMENT_int8_t "int8"
#define ELEMENT_uint8_t "uint8"
#define ELEMENT_int16_t "int16"
#define ELEMENT_int32_t "int32"
#define ELEMENT_int64_t "int64"
#define ELEMENT_Token "int32"
#define ELEMENT_Quad "int32"

#define INTEGER(name) " " #name ":int"
#define FLOAT(name) " " #name ":float"
#define READS(type, name) " " #name ":" ELEMENT_##type
#define MAY_READ(type, name) " " #name ":" ELEMENT_##type "?"
#define WRITES(type, name) READS(type, name)
#define MAY_WRITE(type, name) MAY_READ(type, name)
#define READS_CODES READS(int8_t, low) READS(Token, tokens) READS(Quad, quads) INTEGER(stride)
#define READS_GROUP_CODES READS(int8_t, low) MAY_READ(Token, tokens) MAY_READ(Quad, quads) INTEGER(stride)
#define WRITES_CODES READS_CODES
#define MAY_WRITE_CODES MAY_READ(int8_t, low) MAY_READ(Token, tokens) MAY_READ(Quad, quads) INTEGER(stride)
#define SIGNATURE(operation, arguments) {#operation, "num_rows:int64" arguments, operation},

const Signature SIGNATURES[] = {
#include "operations.h"
};

const int64_t NUM_SIGNATURES = sizeof SIGNATURES / sizeof *SIGNATURES;
