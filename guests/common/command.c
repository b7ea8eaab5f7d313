/* Commands from the host, one per line, WORD NAME=NUMBER WORD, for guests that serve a benchmark. */

#include "guest.h"

static char input[COMMAND_MAX];
static volatile uint32_t input_length, lines;

static void on_receive(void)
{
    inb(UART_IIR);
    while (inb(UART_LSR) & LSR_READY) {
        char c = (char)inb(UART_DATA);

        if (c != '\r' && c != '\n') {
            if (input_length < COMMAND_MAX - 1)
                input[input_length++] = c;
        } else if (input_length) {
            input[input_length] = '\0';
            lines++;
        }
    }
}

void commands_init(void)
{
    irq_enable(IRQ_COM1, on_receive);
    outb(UART_IER, IER_RECEIVE);
}

void read_command(char *line)
{
    static uint32_t seen;

    print("ready\n");
    while (!wait_until(&lines, seen + 1, 4000))
        ;
    seen = lines;
    memcpy(line, input, COMMAND_MAX); /* there is only one line, because the host waits for the answer */
    input_length = 0;
}

bool word_is(const char *text, const char *word)
{
    size_t length = strlen(word);

    return memcmp(text, word, length) == 0 && (text[length] == ' ' || text[length] == '\0');
}

uint32_t number_in(const char *line, const char *name, uint32_t otherwise)
{
    size_t length = strlen(name);

    for (; *line; line++)
        if (line[0] == ' ' && memcmp(line + 1, name, length) == 0 && line[1 + length] == '=')
            return parse_number(line + length + 2, otherwise);
    return otherwise;
}

bool has_word(const char *line, const char *word)
{
    for (; *line; line++)
        if (*line == ' ' && word_is(line + 1, word))
            return true;
    return false;
}
